"""Named shapes of the linear recurrence, shared by the tests and the benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one call.

    Args:
        length: time steps.
        batch: samples.
        trailing: axes of a sample, without that of the pairs.
        decay: shape of a, without the axis of the pairs; it broadcasts against (length, batch, *trailing).
        pairs: complex numbers.
    """

    length: int
    batch: int
    trailing: tuple[int, ...]
    decay: tuple[int, ...]
    pairs: bool = False


CASES: dict[str, Case] = {
    "one_step": Case(1, 2, (3,), (3,)),
    "by_channel": Case(17, 2, (3, 2, 5), (5,), pairs=True),
    "by_element": Case(30, 2, (3, 4), (3, 4)),
    "by_sample": Case(13, 3, (4, 2), (3, 1, 1), pairs=True),
    "by_row": Case(9, 2, (3, 4), (3, 1)),
    "one_number": Case(11, 2, (), ()),
    "varying": Case(31, 2, (7,), (31, 2, 7), pairs=True),
    "varying_by_channel": Case(26, 2, (3, 5), (26, 1, 1, 5)),
    "varying_by_sample": Case(10, 2, (2, 3, 4), (10, 2, 1, 1, 4), pairs=True),
    "checkered": Case(8, 2, (3, 2, 2), (8, 2, 1, 2, 1)),
    "convs5_300": Case(300, 8, (16, 16, 256), (256,), pairs=True),
}
"""Small enough for a CPU, but for the last: a state of ConvS5 over 300 frames of Moving-MNIST."""

SMALL = tuple(name for name in CASES if name != "convs5_300")


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """The tensors a, b and initial_state of ``linear_scan``, random of ordinary size, drawn on the CPU; |a| < 1."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)  # a and states stay wide in mixed precision
    two = (2,) * case.pairs

    def randn(*shape: int) -> Tensor:
        return torch.randn((*shape, *two), generator=generator, dtype=wide)

    a = randn(*case.decay)
    size = a.norm(dim=-1, keepdim=True) if case.pairs else a.abs()
    inputs = {
        "a": a / (1.1 + 0.5 * size * size),
        "b": randn(case.length, case.batch, *case.trailing),
        "initial_state": randn(case.batch, *case.trailing),
    }
    return {name: m.to(device, dtype if name == "b" else wide) for name, m in inputs.items()}
