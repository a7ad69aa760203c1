"""Selective scan of feature maps: VMamba's SS2D with any routes.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
"""

# Shapes: b batch, h w grid, c channels, e inner channels, k routes, r rank of Δ, n state.

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.kernels import ATROUS, BIDIRECTIONAL, CROSS, Routes, routed_scan

from .init import dt_bias_, s4d_real_

Mixer = Callable[..., nn.Module]


def pad_grid(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the end of each grid axis of (b, *grid, c), up to a multiple."""
    if multiple == 1:
        return x
    grid = x.shape[1:-1]
    if not torch.compiler.is_compiling():
        return F.pad(x, (0, 0, *(pad for size in reversed(grid) for pad in (0, -size % multiple))))
    # Written by indices, since torch's pad asks whether there is anything to pad: a compiled program would then serve
    # only the sizes that answer alike.
    for axis, size in enumerate(grid, start=1):
        cells = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
        inside = (cells < size).view(-1, *(1,) * (x.dim() - axis - 1))
        x = torch.where(inside, x.index_select(axis, cells.clamp(max=size - 1)), 0.0)
    return x


def crop_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The first cells of each grid axis of (b, *grid, c); as ``pad_grid``, it does not ask what there is to crop."""
    if not torch.compiler.is_compiling():
        kept = (slice(None), *(slice(size) for size in grid))
        return x[kept]
    for axis, size in enumerate(grid, start=1):
        x = x.index_select(axis, torch.arange(size, device=x.device))
    return x


class RoutedScan(nn.Module):
    """Selective scan of a map along several routes, each with its own Δ, B, C projections and its own A and D.

    Args:
        dim: channels e in and out.
        state: size n of each channel's state.
        rank: rank r of the projection of Δ.
        routes: the orders in which cells are visited.

    Shapes: (b, *grid, e) -> (b, *grid, e). Where strided routes need it, the map is padded with zeros to a multiple of
    the stride and cropped afterwards; padded cells are steps of the scan with u = B = C = 0.
    """

    def __init__(self, dim: int, *, state: int, rank: int, routes: Routes = CROSS) -> None:
        super().__init__()
        self.routes = tuple(routes)
        self.multiple = math.lcm(*(route.stride for route in self.routes))
        count = len(self.routes)
        self.x_proj = nn.Linear(dim, count * (rank + 2 * state), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(count, dim, rank))
        self.dt_bias = nn.Parameter(torch.empty(count, dim))
        self.A_log = nn.Parameter(torch.empty(count, dim, state))
        self.D = nn.Parameter(torch.empty(count, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as released with VMamba: S4D-real A, D = 1, Δ log-uniform in [0.001, 0.1]."""
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_weight, -(self.dt_weight.shape[-1] ** -0.5), self.dt_weight.shape[-1] ** -0.5)
        dt_bias_(self.dt_bias)
        s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        x = pad_grid(x, self.multiple)
        low_rank = self.x_proj(x)  # one product for all routes: a projection per cell commutes with the visiting order
        A = -torch.exp(self.A_log)
        y = routed_scan(x, low_rank, self.dt_weight, self.dt_bias, A, self.D, self.routes)
        return y if self.multiple == 1 else crop_grid(y, grid)

    def extra_repr(self) -> str:
        return f"state={self.A_log.shape[-1]}, rank={self.dt_weight.shape[-1]}, routes={len(self.routes)}"


def _identity(dim: int, *, state: int, rank: int) -> nn.Module:
    return nn.Identity()


MIXERS: dict[str, Mixer] = {
    "cross": RoutedScan,
    "bidirectional": partial(RoutedScan, routes=BIDIRECTIONAL),
    "atrous": partial(RoutedScan, routes=ATROUS),
    "identity": _identity,
}
"""Token mixers by name, each called as mixer(dim, state=, rank=); ``identity`` is the same network without the SSM."""


def find_mixer(mixer: str | Mixer) -> Mixer:
    """The mixer of that name, or the callable itself; raises a ValueError that lists the names otherwise."""
    if not isinstance(mixer, str):
        return mixer
    try:
        return MIXERS[mixer]
    except KeyError:
        raise ValueError(f"unknown mixer {mixer!r}; the mixers are {', '.join(MIXERS)}") from None


class SS2D(nn.Module):
    """Project, convolve, scan, project back (VMamba, section 4.2).

    Args:
        dim: channels c in and out.
        state: size n of each channel's state.
        expand: inner width e as a multiple of ``dim``.
        rank: rank of the projection of Δ; ceil(dim / 16) by default.
        mixer: what mixes the cells: a name in :data:`MIXERS`, or a callable mixer(e, state=, rank=) -> module.
        gate: multiply the output by SiLU of a second projection of the input (VMamba v0, Mamba).
        conv_bias: bias of the depthwise convolution.

    Shapes: (b, h, w, c) -> (b, h, w, c), channels-last throughout.

    Raises:
        ValueError: unknown mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 1,
        expand: float = 1.0,
        rank: int | None = None,
        mixer: str | Mixer = "cross",
        gate: bool = False,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.scan = find_mixer(mixer)(inner, state=state, rank=rank or math.ceil(dim / 16))
        self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.norm(self.scan(x))
        return self.out_proj(y if z is None else y * F.silu(z))
