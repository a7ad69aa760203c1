"""Mamba's block on tokens and on maps.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.
"""

# Shapes: b batch, l tokens, c channels, e inner channels.

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.kernels import Route, Routes, raster

from .bidirectional import Direction
from .mixers import Mixer


class Mamba(nn.Module):
    """Project, mix, gate, project back (Mamba, section 3.4).

    Args:
        dim: channels c in and out.
        mixer: makes what mixes the cells, as mixer(e, state=, rank=): ``BothDirections`` on tokens,
            ``partial(AlongRoutes, routes=...)`` on maps.
        state: size n of each channel's state.
        expand: inner width e as a multiple of ``dim``.
        rank: rank of the projection of Δ; ceil(dim / 16) by default.

    Shapes: (b, l, c) or (b, *grid, c), as the mixer takes them, to itself.
    """

    def __init__(
        self, dim: int, *, mixer: Mixer, state: int = 16, expand: float = 2.0, rank: int | None = None
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.mixer = mixer(inner, state=state, rank=rank or math.ceil(dim / 16))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.mixer(x) * F.silu(z))


class AlongRoute(nn.Module):
    """Causal convolution, SiLU and selective scan along one route of a map: (b, *grid, e) -> (b, *grid, e).

    The map is laid out so that the route reads it from its first cell to its last, or the other way round.

    Raises:
        ValueError: the route skips cells or follows a curve; here it goes through all cells, line by line.
    """

    def __init__(self, dim: int, *, state: int, rank: int, route: Route) -> None:
        super().__init__()
        if route.stride != 1 or route.hilbert:
            raise ValueError(f"a route of Mamba's block goes through all cells, line by line; got {route}")
        axes = len(route.axes)
        self.order = [0, *(axis + 1 for axis in route.axes), axes + 1]
        self.back = [self.order.index(axis) for axis in range(axes + 2)]
        self.direction = Direction(dim, state=state, rank=rank, reverse=route.reverse)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(self.order)
        return self.direction(x.flatten(1, -2)).view(x.shape).permute(self.back)


class AlongRoutes(nn.Module):
    """The sum of Mamba's convolution and scan along several routes, each with its own weights.

    Args:
        dim: channels e in and out.
        state: size n of each channel's state.
        rank: rank of the projection of Δ.
        routes: the orders in which cells are visited, over as many axes as the map has.

    Shapes: (b, *grid, e) -> (b, *grid, e), any grid.

    Raises:
        ValueError: no route, or one that skips cells or follows a curve.
    """

    def __init__(self, dim: int, *, state: int, rank: int, routes: Routes) -> None:
        super().__init__()
        if not routes:
            raise ValueError("at least one route is needed, such as Route((0, 1, 2))")
        self.along = nn.ModuleList(AlongRoute(dim, state=state, rank=rank, route=route) for route in routes)

    def forward(self, x: Tensor) -> Tensor:
        scans: list[Tensor] = []
        for direction in self.along:  # a script takes no slices of modules
            scans.append(direction(x))
        total = scans[0]
        for scan in scans[1:]:
            total = total + scan
        return total


def ahead(spatial_dims: int) -> Mixer:
    """Mamba's convolution and scan from the first cell to the last."""
    return partial(AlongRoutes, routes=raster(spatial_dims)[:1])
