"""Named shapes of the selective scan, shared by the tests and the benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one call: ``groups`` groups share B and C; the scan is over ``length``."""

    batch: int
    dim: int
    length: int
    state: int
    groups: int = 1


CASES: dict[str, Case] = {
    "one_step": Case(2, 6, 1, 4),
    "one_channel": Case(1, 1, 17, 3),
    "prime_length": Case(2, 6, 97, 4, groups=2),
    "state_1": Case(2, 5, 33, 1),
    "state_16": Case(1, 4, 40, 16, groups=4),
    "vim_tiny": Case(8, 384, 197, 16),
}
"""Small enough for a CPU, but for ``vim_tiny``, which is the layer of the published model."""


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ``selective_scan`` with random data of ordinary size, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": randn(case.batch, case.dim, case.length),
        "delta": randn(case.batch, case.dim, case.length) - 2,
        "A": -torch.exp(randn(case.dim, case.state)),
        "B": randn(case.batch, case.groups, case.state, case.length),
        "C": randn(case.batch, case.groups, case.state, case.length),
        "D": randn(case.dim),
        "delta_bias": randn(case.dim),
    }
    parameters = torch.promote_types(dtype, torch.float32)  # A, D and bias stay wide in mixed precision
    wide = {"A", "D", "delta_bias"}
    return {name: m.to(device, parameters if name in wide else dtype) for name, m in inputs.items()}
