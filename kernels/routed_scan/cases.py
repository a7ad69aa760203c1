"""Named shapes of the routed scan, shared by the tests and the benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..routes import ATROUS, AXIAL_3D, BIDIRECTIONAL, CROSS, HILBERT, HILBERT_3D, ROW, TRI_3D, Routes


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``rank`` is that of the projection of Δ. ``shared`` columns serve all routes."""

    batch: int
    grid: tuple[int, ...]
    channels: int
    state: int
    rank: int
    routes: Routes = CROSS
    shared: bool = False


CASES: dict[str, Case] = {
    "one_cell": Case(2, (1, 1), 3, 2, 1),
    "one_row": Case(1, (1, 7), 5, 1, 2),
    "prime_grid": Case(2, (5, 7), 6, 3, 2),
    "state_1": Case(2, (6, 4), 17, 1, 3),
    "bidirectional": Case(1, (3, 5), 4, 2, 1, BIDIRECTIONAL),
    "one_route": Case(1, (4, 3), 4, 2, 1, (ROW,)),
    "atrous": Case(2, (4, 6), 5, 2, 1, ATROUS),
    "atrous_shared": Case(2, (4, 6), 5, 2, 1, ATROUS, shared=True),
    "volume": Case(1, (2, 3, 4), 4, 2, 1, AXIAL_3D),
    "tri": Case(1, (3, 2, 5), 4, 2, 1, TRI_3D),
    "curve": Case(2, (5, 6), 5, 2, 2, HILBERT),
    "curve_volume": Case(2, (3, 2, 5), 4, 1, 1, HILBERT_3D),
    "stage1": Case(128, (56, 56), 96, 1, 6),
    "stage2": Case(128, (28, 28), 192, 1, 12),
    "stage3": Case(128, (14, 14), 384, 1, 24),
    "stage4": Case(128, (7, 7), 768, 1, 48),
    "stage1_n16": Case(128, (56, 56), 96, 16, 6),
    "stage1_1024px": Case(1, (1024, 1024), 96, 1, 6),
}
"""The stages are VMamba-T's at 224 px and batch 128, the first also with 16 states and as a map of 1024 px; the others
are small."""

SMALL = tuple(name for name in CASES if not name.startswith("stage"))


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Tensor arguments of ``routed_scan`` with random data of ordinary size, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    routes = len(case.routes)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    inputs = {
        "x": randn(case.batch, *case.grid, case.channels),
        "low_rank": randn(case.batch, *case.grid, (1 if case.shared else routes) * (case.rank + 2 * case.state)),
        "dt_weight": randn(routes, case.channels, case.rank) * case.rank**-0.5,
        "dt_bias": randn(routes, case.channels) - 3,
        "A": -torch.exp(randn(routes, case.channels, case.state)),
        "D": randn(routes, case.channels),
    }
    parameters = torch.promote_types(dtype, torch.float32)  # the weights stay wide in mixed precision
    return {name: m.to(device, dtype if name in ("x", "low_rank") else parameters) for name, m in inputs.items()}
