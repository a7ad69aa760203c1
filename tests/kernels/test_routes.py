import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vision_ssm.kernels import ATROUS, AXIAL_3D, BIDIRECTIONAL, CROSS, ROUTES, Route, find_routes
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
    back = Route(route.axes, not route.reverse, route.stride, route.offset)
    assert torch.equal(back.index(grid), route.index(grid).flip(0))


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
