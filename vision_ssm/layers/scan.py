"""Selective scan of feature maps along any routes.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
"""

# Shapes: b batch, e channels, k routes, r rank of Δ, n state.

import math
from itertools import product

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from vision_ssm.kernels import CROSS, Routes, routed_scan
from vision_ssm.kernels.routes import disjoint, encode

from .init import dt_bias_, s4d_real_


@register_notrace_function
def pad_grid(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the end of each grid axis of (b, *grid, c), up to a multiple."""
    if multiple == 1:
        return x
    grid = x.shape[1:-1]
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        pads = [0, 0]
        for size in grid[::-1]:
            pads += [0, -size % multiple]
        return F.pad(x, pads)
    # Written by indices, since torch's pad asks whether there is anything to pad: a compiled program would then serve
    # only the sizes that answer alike. On a list of cells, for the reason that ``SS`` gives.
    padded = [(size + multiple - 1) // multiple * multiple for size in grid]
    index = torch.zeros([], dtype=torch.int64, device=x.device)
    inside = torch.ones([], dtype=torch.bool, device=x.device)
    for size, wanted in zip(grid, padded, strict=True):
        cells = torch.arange(wanted, device=x.device)
        index = index[..., None] * size + cells.clamp(max=size - 1)
        inside = inside[..., None] & (cells < size)
    cells = x.flatten(1, -2).index_select(1, index.flatten())
    return torch.where(inside.flatten()[:, None], cells, 0.0).unflatten(1, padded)


def crop_grid(x: Tensor, grid: list[int]) -> Tensor:
    """The first cells of each grid axis of (b, *grid, c); as ``pad_grid``, it does not ask what there is to crop."""
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        for axis, size in enumerate(grid):
            x = x.narrow(axis + 1, 0, size)
        return x
    index = torch.zeros([], dtype=torch.int64, device=x.device)
    for size, padded in zip(grid, x.shape[1:-1], strict=True):
        index = index[..., None] * padded + torch.arange(size, device=x.device)
    return x.flatten(1, -2).index_select(1, index.flatten()).unflatten(1, grid)


def _phases(routes: Routes) -> tuple[int, ...]:
    """The route that visits each phase of a strided grid, row-major; none unless each phase has one route, its own."""
    offsets = [route.offset for route in routes]
    if len(routes) == 1 or not disjoint(routes) or len(routes) != routes[0].stride ** len(routes[0].axes):
        return ()
    return tuple(offsets.index(phase) for phase in product(range(routes[0].stride), repeat=len(routes[0].axes)))


@register_notrace_module
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
        self.code = encode(self.routes)
        self.multiple = math.lcm(*(route.stride for route in self.routes))
        count = len(self.routes)
        self.phases = _phases(self.routes)
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
        grid = list(x.shape[1:-1])
        x = pad_grid(x, self.multiple)
        A = -torch.exp(self.A_log)
        if torch.jit.is_scripting():  # a script knows integers, no routes
            low_rank = self.x_proj(x)
            y = torch.ops.vision_ssm.routed_scan(x, low_rank, self.dt_weight, self.dt_bias, A, self.D, self.code, [])
        else:
            low_rank = self.project(x)
            y = routed_scan(x, low_rank, self.dt_weight, self.dt_bias, A, self.D, self.routes)
        return y if self.multiple == 1 else crop_grid(y, grid)

    def project(self, x: Tensor) -> Tensor:
        """Δ, B and C of each cell: a projection per cell commutes with the order of visiting.

        One product for all routes; where no cell is visited twice, each cell's for the route that visits it alone.
        """
        if not self.phases:
            return self.x_proj(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])
        split = [size for cells in x.shape[1:-1] for size in (cells // self.multiple, self.multiple)]
        axes = len(split) // 2
        first = [*range(2, 2 * axes + 1, 2), 0, *range(1, 2 * axes, 2), 2 * axes + 1]  # the phases of each axis
        maps = x.flatten(1, -2).view(x.shape[0], *split, -1).permute(first)
        weights = self.x_proj.weight.unflatten(0, (len(self.routes), -1))
        phases = torch.stack([weights[route] for route in self.phases])
        low_rank = maps.flatten(axes, -2).flatten(0, axes - 1) @ phases.transpose(1, 2)
        low_rank = low_rank.view(*maps.shape[:-1], -1)
        return low_rank.permute([first.index(axis) for axis in range(len(first))]).reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"state={self.A_log.shape[-1]}, rank={self.dt_weight.shape[-1]}, routes={len(self.routes)}"
