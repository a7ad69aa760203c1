"""Named shapes of the scalar-decay scan, shared by the tests and the benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``groups`` divides ``heads``."""

    batch: int
    length: int
    heads: int
    width: int
    state: int
    groups: int = 1


CASES: dict[str, Case] = {
    "one_step": Case(2, 1, 3, 2, 4),
    "two_chunks": Case(1, 97, 2, 3, 2),
    "full_chunks": Case(1, 128, 1, 2, 3),
    "groups": Case(2, 17, 4, 2, 3, groups=2),
    "one_of_each": Case(1, 5, 1, 1, 1),
    "hydra_vit_base": Case(32, 196, 24, 64, 64),
    "hydra_vit_small": Case(128, 196, 12, 64, 64),
    "long": Case(1, 4096, 12, 64, 64),
}
"""Small enough for a CPU, but for the last three: layers of the models at 224 px, and of the smaller at 1024 px."""

SMALL = tuple(name for name, case in CASES.items() if case.width < 64)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ``ssd_scan`` with random data of ordinary size, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": randn(case.batch, case.length, case.heads, case.width),
        "dt": torch.nn.functional.softplus(randn(case.batch, case.length, case.heads) - 2),
        "A": -torch.exp(randn(case.heads)),
        "B": randn(case.batch, case.length, case.groups, case.state),
        "C": randn(case.batch, case.length, case.groups, case.state),
        "initial_state": randn(case.batch, case.heads, case.width, case.state),
    }
    wide = torch.promote_types(dtype, torch.float32)  # dt, A and states stay wide in mixed precision
    return {name: m.to(device, dtype if name in ("x", "B", "C") else wide) for name, m in inputs.items()}
