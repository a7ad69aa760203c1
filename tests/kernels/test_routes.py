import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vision_ssm.kernels import (
    ATROUS,
    AXIAL_3D,
    BIDIRECTIONAL,
    CROSS,
    HILBERT_3D,
    RASTER_3D,
    ROUTES,
    TRI_3D,
    Route,
    atrous,
    axial,
    find_routes,
    hilbert,
    raster,
    tri,
)
from vision_ssm.kernels.routes import check_routes, decode, encode


@st.composite
def routes_and_grids(draw):
    grid = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    stride = draw(st.integers(1, min(3, *grid)))
    offset = tuple(draw(st.integers(0, stride - 1)) for _ in grid)
    axes = tuple(draw(st.permutations(range(len(grid)))))
    return Route(axes, draw(st.booleans()), stride, offset), grid


@given(routes_and_grids())
def test_arithmetic_equals_table(case):
    route, grid = case
    sizes, steps, first = route.affine(grid)
    cells = torch.full((1,), first)
    for size, step in zip(sizes, steps, strict=True):
        cells = (cells[:, None] + step * torch.arange(size)).reshape(-1)
    assert torch.equal(cells, route.index(grid))
    assert route.length(grid) == len(cells) == len(set(cells.tolist()))
    assert all(0 <= cell < math.prod(grid) for cell in cells.tolist())


@given(routes_and_grids())
def test_a_reversed_route_visits_backwards(case):
    route, grid = case
    for curve in (False, True):
        ahead, back = (Route(route.axes, reverse, route.stride, route.offset, curve) for reverse in (False, True))
        assert torch.equal(back.index(grid), ahead.index(grid).flip(0))


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_codes_survive(routes):
    assert decode(encode(routes), len(routes[0].axes)) == routes


def test_cross_is_rows_columns_and_back():
    rows, columns, rows_back, columns_back = (route.index((2, 3)).tolist() for route in CROSS)
    assert rows == [0, 1, 2, 3, 4, 5]
    assert columns == [0, 3, 1, 4, 2, 5]
    assert (rows_back, columns_back) == (rows[::-1], columns[::-1])
    assert [route.index((2, 3)).tolist() for route in BIDIRECTIONAL] == [rows, rows_back]


def test_atrous_partitions_the_map():
    visited = torch.cat([route.index((4, 6)) for route in ATROUS])
    assert sorted(visited.tolist()) == list(range(24))


@pytest.mark.parametrize("dims", [2, 3])
def test_atrous_partitions_a_grid_of_any_axes(dims):
    grid = (3, 6, 9)[:dims]
    visited = torch.cat([route.index(grid) for route in atrous(3, dims)])
    assert sorted(visited.tolist()) == list(range(math.prod(grid)))


def test_sets_of_images_are_those_of_the_papers():
    assert (axial(2), raster(2), atrous(2, 2)) == (CROSS, BIDIRECTIONAL, ATROUS)


def test_tri_is_slices_back_and_from_slice_to_slice():
    ahead, back, across = (route.index((2, 2, 3)).tolist() for route in TRI_3D)
    assert [ahead, back] == [route.index((2, 2, 3)).tolist() for route in RASTER_3D] == [ahead, ahead[::-1]]
    assert across == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert tri(2)[2].index((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_hilbert_visits_every_cell_and_steps_to_neighbours(grid):
    order = hilbert(len(grid))[0].index(grid)
    assert sorted(order.tolist()) == list(range(math.prod(grid)))
    cells = torch.stack(torch.unravel_index(order, tuple(grid)), 1)
    longest = grid.index(max(grid))
    assert cells[0].tolist() == [0] * len(grid)
    assert cells[-1].tolist() == [size - 1 if axis == longest else 0 for axis, size in enumerate(grid)]
    steps = cells.diff(dim=0).abs()
    assert steps.sum() == 0 or steps.max() == 1  # at worst across a corner
    if all(size % 2 == 0 for size in grid):
        assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_hilbert_stays_in_a_part_until_all_of_it_is_visited(dims):
    grid = (8,) * dims
    cells = torch.stack(torch.unravel_index(hilbert(dims)[0].index(grid), grid), 1)
    for side in (2, 4):
        assert len(torch.unique_consecutive(cells // side, dim=0)) == (8 // side) ** dims


def test_hilbert_follows_the_axes_and_the_stride():
    wide = Route((0, 1), hilbert=True).index((4, 4)).view(-1)
    high = Route((1, 0), hilbert=True).index((4, 4))
    assert torch.equal(torch.arange(16).view(4, 4).T.reshape(-1)[wide], high) and not torch.equal(wide, high)
    strided = Route((0, 1), stride=2, offset=(1, 0), hilbert=True).index((4, 4))
    assert strided.tolist() == [4, 6, 14, 12]
    assert HILBERT_3D[1].reverse and Route((0, 1), stride=2, offset=(1, 1), hilbert=True).index((1, 1)).tolist() == []


def test_axial_routes_run_along_every_axis():
    first_steps = {route.index((2, 3, 4)).diff()[0].item() for route in AXIAL_3D}
    assert first_steps == {1, -1, 4, -4, 12, -12}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Route((0, 0)), "permutation"),
        (lambda: Route(()), "permutation"),
        (lambda: Route((0, 1), stride=0), "at least 1"),
        (lambda: Route((0, 1), stride=2, offset=(0, 2)), r"0\.\.1"),
        (lambda: Route((0, 1), offset=(0,)), "2 values"),
        (lambda: Route((0, 1), hilbert=True).affine((2, 3)), "read its table"),
        (lambda: Route((0, 1, 2, 3), hilbert=True).index((2, 2, 2, 2)), "at most 3 axes"),
        (lambda: find_routes("crossed"), "row, cross, bidirectional, atrous"),
        (lambda: check_routes(ATROUS, (5, 7)), r"\[12, 8, 9, 6\].*multiple of 2"),
        (lambda: check_routes(CROSS, (2, 3, 4)), "3-D grid"),
        (lambda: check_routes((), (2, 3)), "at least one route"),
        (lambda: check_routes("cross", (2, 3)), "tuple of Route"),
    ],
)
def test_errors_say_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
