"""A Hilbert curve through a box of any size.

Hilbert's own (1891) needs a square whose side is a power of two. This one halves the sides of the box as it goes, and a
step leads to a neighbouring cell all the same: across a face if all sides are even, at worst across a corner if not.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

AXES = 3

Side = tuple[int, int, int]
"""An axis, the cell on it that a part of a box begins at, and the one that it ends at."""


def hilbert_order(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Flat indices of all cells in the order of the curve, which runs from the first to the far end of a longest side.

    Of equal sides that is the first. A cube of a power of two is visited octant by octant, and so is each octant.

    Raises:
        ValueError: more than three axes.
    """
    if len(sizes) > AXES:
        raise ValueError(f"a Hilbert curve takes grids of at most {AXES} axes; got the grid {tuple(sizes)}")

    @cache  # the parts of a box differ in few sizes
    def walk(a: int, b: int, c: int) -> NDArray[np.int32]:
        """Cells of a box of a x b x c, (cells, 3), from the first to the far end of side a."""
        if c > b:
            return walk(a, c, b)[:, [0, 2, 1]]
        if a == 1 and b > 1:  # no way back to where it began: ends a cell away, since b is 2 here at most
            return walk(b, c, 1)[:, [2, 0, 1]]
        if b == 1:
            return np.arange(a, dtype=np.int32)[:, None] * np.array([1, 0, 0], dtype=np.int32)
        return np.concatenate([_placed(walk(*map(_length, part)), part) for part in _parts(a, b, c)])

    axes = sorted(range(len(sizes)), key=lambda axis: -sizes[axis])
    cells = walk(*(sizes[axis] for axis in axes), *(1,) * (AXES - len(axes)))
    return np.ravel_multi_index([cells[:, axes.index(axis)] for axis in range(len(axes))], tuple(sizes))


def _length(side: Side) -> int:
    _, begin, end = side
    return abs(end - begin) + 1


def _back(side: Side) -> Side:
    axis, begin, end = side
    return axis, end, begin


def _placed(cells: NDArray[np.int32], part: tuple[Side, ...]) -> NDArray[np.int32]:
    """The cells of a part, counted along its own sides, as cells of the box that it is a part of."""
    placed = np.empty_like(cells)
    for own, (axis, begin, end) in enumerate(part):
        placed[:, axis] = begin + (cells[:, own] if end >= begin else -cells[:, own])
    return placed


def _parts(a: int, b: int, c: int) -> list[tuple[Side, Side, Side]]:
    """Parts of a box with b >= c, in order; each is walked along the first of its sides, from the begin of all three.

    A long box is cut across. One that is flat goes up the first half of b, along a and down again; any other one up b
    and c, along a, and down both.
    """
    (a_low, a_high), (b_low, b_high), (c_low, c_high) = (_halves(axis, size) for axis, size in enumerate((a, b, c)))
    a_all, b_all, c_all = (0, 0, a - 1), (1, 0, b - 1), (2, 0, c - 1)
    if 2 * a > 3 * b:
        return [(a_low, b_all, c_all), (a_high, b_all, c_all)]
    if 3 * b > 4 * c:
        return [(b_low, a_low, c_all), (a_all, b_high, c_all), (_back(b_low), _back(a_high), c_all)]
    return [
        (b_low, a_low, c_low),
        (c_all, a_low, b_high),
        (a_all, _back(b_low), _back(c_high)),
        (_back(c_all), _back(a_high), b_high),
        (_back(b_low), _back(a_high), c_low),
    ]


def _halves(axis: int, size: int) -> tuple[Side, Side]:
    """A side in two; the first half is even where it can be, since only then faces lead all the way along the next."""
    half = size // 2
    if half % 2 and size > 2:
        half += 1
    return (axis, 0, half - 1), (axis, half, size - 1)
