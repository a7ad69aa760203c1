"""How the GPU walks a grid: the routes as a table that kernels read, and which routes go together."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..routes import Affine, Route, Routes, disjoint

AXES = 3
FIELDS = 10
"""Columns of the table: sizes of the two faster axes, cells that a step moves along each of three axes, first cell,
runs in a sample, steps in a run, whether the route is reversed, its index."""

_SHORTEST = 8


class Plan(NamedTuple):
    """The routes' table (k, FIELDS); runs of a sample and steps of a run, at most over the routes; and the cells of the
    paths, one path after the other, where some are no arithmetic."""

    table: Tensor
    runs: int
    steps: int
    order: Tensor | None


class Launch(NamedTuple):
    """Rows of the table that go together: ``groups`` x ``routes`` from ``first`` on, and whether they fill the grid.

    The routes of a group walk the same cells, and one program walks them all; groups share no cell.
    """

    first: int
    groups: int
    routes: int
    full: bool


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@cache  # tables are small, and a CUDA graph may hold the address of any for as long as it lives
def plan(routes: Routes, grid: tuple[int, ...], pieces: int, device: torch.device) -> Plan:
    """Cuts every line of the fastest axis into about ``pieces`` runs, none much shorter than ``_SHORTEST`` steps."""
    rows = []
    order = path_order(routes, grid, device) if curved(routes) else None
    for k in _order(routes):
        sizes, steps, first = _in_order(routes, k, grid) if curved(routes) else _ahead(routes[k]).affine(grid)
        sizes, steps = (1,) * (AXES - len(sizes)) + sizes, (0,) * (AXES - len(steps)) + steps
        length = ceil_div(sizes[2], max(1, min(pieces, sizes[2] // _SHORTEST)))
        runs = sizes[0] * sizes[1] * ceil_div(sizes[2], length)
        rows.append((*sizes[1:], *steps, first, runs, length, int(routes[k].reverse), k))
    table = kept(torch.tensor(rows, dtype=torch.int64), device)
    return Plan(table, max(row[6] for row in rows), max(row[7] for row in rows), order)


def curved(routes: Routes) -> bool:
    """Whether some route is no arithmetic, so that all are read from tables."""
    return any(route.hilbert for route in routes)


@cache  # for the reason that plans are
def path_order(routes: Routes, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The cells of every path, one path after the other, int32."""
    return kept(torch.cat([route.index(grid) for route in _paths(routes)]).int(), device)


def _in_order(routes: Routes, k: int, grid: tuple[int, ...]) -> Affine:
    """A route as the places in ``path_order`` of its cells: a single line."""
    length = routes[k].length(grid)
    return Affine((length,), (1,), _paths(routes).index(_ahead(routes[k])) * length)


def _ahead(route: Route) -> Route:
    """The path of a route: what it and its reverse have in common."""
    return replace(route, reverse=False)


def _paths(routes: Routes) -> list[Route]:
    return list(dict.fromkeys(map(_ahead, routes)))


def kept(table: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` that outlives the call. Memory that a thread allocates while it records a CUDA graph belongs
    to that graph, so another thread allocates it."""

    def make() -> Tensor:
        copy = table.to(device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return copy

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def launches(routes: Routes, grid: tuple[int, ...]) -> list[Launch]:
    """One launch per path; paths that share no cell go together."""
    paths = [_ahead(routes[k]) for k in _order(routes)]
    found: list[Launch] = []
    members: list[Route] = []
    for path in _paths(routes):
        count = paths.count(path)
        last = found[-1] if found else None
        if last and last.routes == count and all(disjoint((path, other)) for other in members):
            members.append(path)
            found[-1] = last._replace(groups=last.groups + 1)
        else:
            members = [path]
            found.append(Launch(paths.index(path), 1, count, False))
    visited = routes[0].length(grid)
    return [launch._replace(full=launch.groups * visited == math.prod(grid)) for launch in found]


def _order(routes: Routes) -> list[int]:
    """The routes' indices, those of one path side by side."""
    paths = _paths(routes)
    return sorted(range(len(routes)), key=lambda k: (paths.index(_ahead(routes[k])), k))
