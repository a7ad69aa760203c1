"""Routes: the orders in which a scan visits the cells of a grid.

A route is data. VMamba's cross scan, Vim's two directions, EfficientVMamba's atrous scan and the scans of volumes and
clips are tuples of routes; the operators know only the sequences that come out. A set that images and volumes have is a
function of the number of grid axes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .hilbert import hilbert_order

__all__ = [
    "ATROUS",
    "AXIAL_3D",
    "BIDIRECTIONAL",
    "COLUMN",
    "COLUMN_BACK",
    "CROSS",
    "HILBERT",
    "HILBERT_3D",
    "RASTER_3D",
    "ROUTES",
    "ROW",
    "ROW_BACK",
    "TRI_3D",
    "Route",
    "Routes",
    "atrous",
    "axial",
    "find_routes",
    "hilbert",
    "raster",
    "tri",
]


class Affine(NamedTuple):
    """A route as arithmetic: digit i of a step, counted in the mixed radix ``sizes``, moves ``steps[i]`` cells."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Route:
    """One order of visiting the cells of an n-D grid.

    Args:
        axes: grid axes from slowest to fastest; (0, 1) is row by row, (1, 0) column by column.
        reverse: visit in the opposite order.
        stride: visit every ``stride``-th cell along each axis (atrous scan).
        offset: first cell visited along each axis; zeros by default.
        hilbert: visit these cells along a Hilbert curve, not line by line. It ends at the far end of the longest axis,
            of equally long ones the slowest. Of up to three axes.

    Raises:
        ValueError: ``axes`` is no permutation, ``stride`` is below 1, or ``offset`` does not fit.
    """

    axes: tuple[int, ...]
    reverse: bool = False
    stride: int = 1
    offset: tuple[int, ...] | None = None
    hilbert: bool = False

    def __post_init__(self) -> None:
        if not self.axes or sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"axes must be a permutation of 0..n-1, slowest axis first; got {self.axes!r}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1; got {self.stride}")
        offset = (0,) * len(self.axes) if self.offset is None else tuple(self.offset)
        if len(offset) != len(self.axes) or not all(0 <= first < self.stride for first in offset):
            raise ValueError(
                f"offset must hold {len(self.axes)} values in 0..stride-1 = 0..{self.stride - 1}; got {self.offset!r}"
            )
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "offset", offset)

    def visited(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Number of cells visited along each grid axis."""
        assert self.offset is not None
        return tuple(
            (size - first + self.stride - 1) // self.stride for size, first in zip(grid, self.offset, strict=True)
        )

    def length(self, grid: Sequence[int]) -> int:
        """Number of steps on ``grid``."""
        return math.prod(self.visited(grid))

    def index(self, grid: Sequence[int]) -> Tensor:
        """Flat indices of the visited cells, in order: (l,) int64."""
        assert self.offset is not None
        cells = torch.arange(math.prod(grid)).reshape(tuple(grid))
        order = cells[tuple(slice(first, None, self.stride) for first in self.offset)].permute(self.axes).reshape(-1)
        if self.hilbert and len(order):
            curve = hilbert_order([self.visited(grid)[axis] for axis in self.axes])
            order = order[torch.from_numpy(curve)]
        return order.flip(0) if self.reverse else order

    def affine(self, grid: Sequence[int]) -> Affine:
        """The same order as :meth:`index`, for kernels that compute addresses in place of reading a table.

        Raises:
            ValueError: the route is a Hilbert curve, which is no arithmetic.
        """
        assert self.offset is not None
        if self.hilbert:
            raise ValueError(f"{self} follows a curve; read its table, index(grid)")
        pitch = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        visited = self.visited(grid)
        sizes = tuple(visited[axis] for axis in self.axes)
        steps = tuple(self.stride * pitch[axis] for axis in self.axes)
        first = sum(start * cells for start, cells in zip(self.offset, pitch, strict=True))
        if not self.reverse:
            return Affine(sizes, steps, first)
        last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        return Affine(sizes, tuple(-step for step in steps), last)


Routes = tuple[Route, ...]
RouteSet = Callable[[int], Routes]
"""Routes for a grid of so many axes."""

ROW, COLUMN = Route((0, 1)), Route((1, 0))
ROW_BACK, COLUMN_BACK = Route((0, 1), reverse=True), Route((1, 0), reverse=True)

CROSS: Routes = (ROW, COLUMN, ROW_BACK, COLUMN_BACK)
"""VMamba (arXiv:2401.10166): rows, columns, and both backwards."""

BIDIRECTIONAL: Routes = (ROW, ROW_BACK)
"""Vim (arXiv:2401.09417): rows, there and back."""


def raster(dims: int) -> Routes:
    """Line by line, the last axis fastest, there and back."""
    axes = tuple(range(dims))
    return Route(axes), Route(axes, reverse=True)


def axial(dims: int) -> Routes:
    """Fastest along each axis in turn, then all of them back: ``CROSS`` on images."""
    turns = [tuple((first + axis) % dims for axis in range(dims)) for first in range(dims)]
    return tuple(Route(axes, reverse=reverse) for reverse in (False, True) for axes in turns)


def tri(dims: int) -> Routes:
    """SegMamba (arXiv:2401.13560, section 2.2): slice by slice, the same back, and from slice to slice at each pixel.

    Slices are the cells of the first axis, so on images the third route is column by column.
    """
    return *raster(dims), Route((*range(1, dims), 0))


def hilbert(dims: int) -> Routes:
    """A Hilbert curve, there and back: each step leads to a neighbouring cell, whatever the grid."""
    axes = tuple(range(dims))
    return Route(axes, hilbert=True), Route(axes, reverse=True, hilbert=True)


def atrous(stride: int, dims: int = 2) -> Routes:
    """EfficientVMamba (arXiv:2403.09977): ``stride`` x ``stride`` interleaved sub-maps, each walked once.

    Sub-maps that begin on an even row are walked row by row, the others column by column, as the paper does for 2 x 2;
    those of volumes likewise by their first slice, with the first axis fastest in place of column by column. Every cell
    is visited once, whatever the stride.

    Raises:
        ValueError: ``stride`` is below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1; got {stride}")
    axes = tuple(range(dims))
    return tuple(
        Route(axes if offset[-1] % 2 == 0 else axes[::-1], stride=stride, offset=offset[::-1])
        for offset in product(range(stride), repeat=dims)
    )


ATROUS: Routes = atrous(2)
"""EfficientVMamba's published routes: four sub-maps."""

AXIAL_3D: Routes = axial(3)
"""Volumes (d, h, w): fastest along each of the three axes, and back."""

RASTER_3D: Routes = raster(3)
"""Volumes: slice by slice and row by row, there and back."""

TRI_3D: Routes = tri(3)
"""SegMamba's three orders of a volume."""

HILBERT: Routes = hilbert(2)
HILBERT_3D: Routes = hilbert(3)

ROUTES: dict[str, Routes] = {
    "row": (ROW,),
    "cross": CROSS,
    "bidirectional": BIDIRECTIONAL,
    "atrous": ATROUS,
    "hilbert": HILBERT,
    "axial_3d": AXIAL_3D,
    "raster_3d": RASTER_3D,
    "tri_3d": TRI_3D,
    "hilbert_3d": HILBERT_3D,
}


def find_routes(name: str) -> Routes:
    """The route set called ``name``; raises a ValueError that lists the names otherwise."""
    try:
        return ROUTES[name]
    except KeyError:
        raise ValueError(f"unknown routes {name!r}; the named route sets are {', '.join(ROUTES)}") from None


@lru_cache(maxsize=256)
def index_table(routes: Routes, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The orders of all routes, (k, l) int64, kept between calls.

    Raises:
        ValueError: the routes visit different numbers of cells (an atrous scan of an odd map).
    """
    check_routes(routes, grid)
    with torch.inference_mode(False):  # what is made in that mode is of no use to a later gradient
        return torch.stack([route.index(grid) for route in routes]).to(device)


def disjoint(routes: Routes) -> bool:
    """Whether no cell is visited by two of the routes, whatever the grid: same stride, other offsets."""
    return len({route.stride for route in routes}) == 1 and len({route.offset for route in routes}) == len(routes)


def check_routes(routes: Routes, grid: Sequence[int]) -> int:
    """The common length of ``routes`` on ``grid``; raises ValueError if they do not fit it or differ in length."""
    if not routes:
        raise ValueError("at least one route is needed, such as vision_ssm.kernels.CROSS")
    for route in routes:
        if not isinstance(route, Route):
            raise ValueError(
                f"routes must be a tuple of Route; got {route!r}. Find a named set by find_routes: {', '.join(ROUTES)}"
            )
        if len(route.axes) != len(grid):
            raise ValueError(f"{route} is for a {len(route.axes)}-D grid; got the {len(grid)}-D grid {tuple(grid)}")
    lengths = [route.length(grid) for route in routes]
    if min(lengths) != max(lengths):
        multiple = math.lcm(*(route.stride for route in routes))
        raise ValueError(
            f"routes must visit equally many cells; on the grid {tuple(grid)} they visit {lengths}. "
            f"Pad every side to a multiple of {multiple} and crop afterwards."
        )
    return lengths[0]


def encode(routes: Routes) -> list[int]:
    """Routes as the flat integers that an operator's schema can hold."""
    return [
        value
        for route in routes
        for value in (*route.axes, int(route.reverse), route.stride, *(route.offset or ()), int(route.hilbert))
    ]


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...], dims: int) -> Routes:
    width = 2 * dims + 3
    rows = (code[start : start + width] for start in range(0, len(code), width))
    return tuple(Route(row[:dims], bool(row[dims]), row[dims + 1], row[dims + 2 : -1], bool(row[-1])) for row in rows)


def decode(code: Sequence[int], dims: int) -> Routes:
    """Undo :func:`encode` for a grid of ``dims`` axes."""
    return _decode(tuple(code), dims)
