"""The operators in PyTorch's own: what an exported program holds in their place, so that it needs none of this package.

A scan is a tree: neighbouring steps become one until a single one is left, and the states go back down. The number of
operators grows with the logarithm of the length and the arithmetic with the length; since only decays are multiplied,
which lie between 0 and 1, nothing overflows. Sizes may be symbols with an upper bound, which decides on the depth.
"""

# Shapes: l steps, b batch, k routes, c channels, r rank, n state, h heads, p width of a head, q steps of a chunk.
# Steps come first and symbols seldom: PyTorch computes with the formulas of all sizes and strides, which takes longest.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .checks import compute_dtype
from .pairs import multiply
from .routes import Route, decode
from .ssd_scan.chunked import STEPS, in_chunks

__all__ = ["decompositions"]

LEVELS = 5
"""Of a tree whose sizes are numbers; what it leaves over is the next tree's length."""

Product = Callable[[Tensor, Tensor], Tensor]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: every operator of this package, for inference."""
    ops = torch.ops.vision_ssm
    return {
        ops.cross_scan.default: cross_scan,
        ops.cross_merge.default: cross_merge,
        ops.selective_scan.default: selective_scan,
        ops.routed_scan.default: routed_scan,
        ops.ssd_scan.default: ssd_scan,
        ops.linear_scan.default: linear_scan,
    }


def longest(length: int | torch.SymInt) -> int:
    """The greatest value of a size.

    Raises:
        ValueError: it has none.
    """
    if isinstance(length, int):
        return length
    assert length.node.shape_env is not None
    upper = length.node.shape_env.bound_sympy(length.node.expr).upper
    if not upper.is_Integer:
        raise ValueError(f"a scan of unbounded length {length} has no depth; give every dynamic size a maximum")
    return int(upper)


def scan(a: Tensor, b: Tensor, times: Product = torch.mul) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along the first axis, from zero; a broadcasts against b in the others."""
    length = b.shape[0]
    bound = longest(length)
    if bound == 1:
        return b
    levels = min(LEVELS, (bound - 1).bit_length())
    a, b = (_cut(m, 2**levels) for m in (a, b))
    evens = []
    for _ in range(levels):
        even_a, even_b, odd_a, odd_b = a[:, ::2], b[:, ::2], a[:, 1::2], b[:, 1::2]
        evens.append((even_a, even_b))
        a, b = times(odd_a, even_a), times(odd_a, even_b) + odd_b
    h = scan(a[:, 0], b[:, 0], times).unsqueeze(1)  # at the end of each part
    entering = _after(torch.zeros_like(h[:1]), h)
    for even_a, even_b in reversed(evens):
        before = torch.cat([entering, h[:, :-1]], dim=1) if h.shape[1] > 1 else entering
        h = torch.cat([(times(even_a, before) + even_b).unsqueeze(2), h.unsqueeze(2)], dim=2).flatten(1, 2)
    return h.flatten(0, 1)[:length]


def _cut(m: Tensor, steps: int) -> Tensor:
    """(l, ...) in parts of so many steps; zeros fill the last."""
    length = m.shape[0]
    parts = 1 if longest(length) <= steps else (length + steps - 1) // steps
    if not statically_known_true(parts * steps == length):
        m = F.pad(m, (*(0, 0) * (m.dim() - 1), 0, steps - 1))[: parts * steps]
    return m.unflatten(0, (parts, steps))


def _after(first: Tensor, h: Tensor) -> Tensor:
    """The states before each step: ``first``, then all of ``h`` but its last."""
    return first if statically_known_true(h.shape[0] == 1) else torch.cat([first, h])[: h.shape[0]]


def _read(x: Tensor, route: Route) -> Tensor:
    """Cells of a map in the order of a route: (b, *grid, c) -> (l, b, c)."""
    axes = x.dim() - 2
    if route.hilbert:
        return x.flatten(1, -2)[:, _table(route, x.shape[1:-1], x.device)].transpose(0, 1)
    assert route.offset is not None
    if route.stride > 1:
        for axis, first in enumerate(route.offset, start=1):
            x = torch.ops.aten.slice.Tensor(x, axis, first, None, route.stride)
    cells = x.permute(*(axis + 1 for axis in route.axes), 0, axes + 1).flatten(0, axes - 1)
    return cells.flip(0) if route.reverse else cells


def _put(y: Tensor, route: Route, grid: Sequence[int]) -> Tensor:
    """Steps back on their cells, 0 where there are none: (l, b, c) -> (b, *grid, c)."""
    axes = len(grid)
    if route.hilbert:
        table = _table(route, grid, y.device)
        return y.new_zeros(len(table), *y.shape[1:]).index_copy(0, table, y).transpose(0, 1).unflatten(1, tuple(grid))
    visited = route.visited(grid)
    steps = (y.flip(0) if route.reverse else y).unflatten(0, tuple(visited[axis] for axis in route.axes))
    x = steps.permute(axes, *(route.axes.index(axis) for axis in range(axes)), axes + 1)
    if route.stride == 1:
        return x
    assert route.offset is not None
    for axis, (first, size) in enumerate(zip(route.offset, grid, strict=True), start=1):
        behind = (0, 0) * (axes + 1 - axis)
        whole = statically_known_true(x.shape[axis] * route.stride == size)
        if not whole:
            x = F.pad(x, (*behind, 0, 1))  # so that it is no shorter than the grid
        x = F.pad(x.unsqueeze(axis + 1), (*behind, first, route.stride - 1 - first)).flatten(axis, axis + 1)
        x = x if whole else x.narrow(axis, 0, size)
    return x


def _table(route: Route, grid: Sequence[int], device: torch.device) -> Tensor:
    if not all(isinstance(size, int) for size in grid):
        raise ValueError("a Hilbert curve is a table for one grid; export the model for a fixed height and width")
    return route.index(grid).to(device)


def _merge(y: Tensor, routes: Sequence[Route], grid: Sequence[int]) -> Tensor:
    """Steps of all routes back on their cells, added up: (l, b, k, c) -> (b, *grid, c)."""
    total = _put(y[:, :, 0], routes[0], grid)
    for k, route in enumerate(routes[1:], start=1):
        total = total + _put(y[:, :, k], route, grid)
    return total


def cross_scan(x: Tensor, routes: Sequence[int]) -> Tensor:
    """See :func:`vision_ssm.kernels.cross_scan.op.cross_scan`."""
    cells = x.movedim(1, -1)
    return torch.stack([_read(cells, route).permute(1, 2, 0) for route in decode(routes, x.dim() - 2)], dim=1)


def cross_merge(y: Tensor, routes: Sequence[int], grid: Sequence[int]) -> Tensor:
    """See :func:`vision_ssm.kernels.cross_scan.op.cross_merge`."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).permute(3, 0, 1, 2)
    return _merge(wide, decode(routes, len(grid)), grid).movedim(-1, 1).to(y.dtype)


def _outputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t + D u_t with h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, and the last state.

    Shapes: u, delta (l, b, k, c); A (k, c, n); B, C (l, b, k, n); D (k, c); states (b, k, c, n).
    """
    decay, entering = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[..., None, :]
    if initial is not None:
        entering = torch.cat([entering[:1] + decay[:1] * initial, entering[1:]])
    h = scan(decay.flatten(2), entering.flatten(2)).unflatten(2, A.shape)
    y = (h * C[..., None, :]).sum(-1)
    return (y if D is None else y + u * D), h[-1].clone()


def routed_scan(
    x: Tensor,
    low_rank: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`."""
    shape, dtype = x.shape, x.dtype
    wide = (m.to(compute_dtype(x, A)) for m in (x, low_rank, dt_weight, dt_bias, A, D))
    x, low_rank, dt_weight, dt_bias, A, D = wide
    if grid:
        x, low_rank = (m.unflatten(1, tuple(grid)) for m in (x, low_rank))
    else:
        grid = shape[1:-1]
    decoded = decode(routes, len(grid))
    channels, rank, state = *dt_weight.shape[1:], A.shape[2]
    maps = low_rank.split(rank + 2 * state, dim=-1)
    sequences = []
    for k, route in enumerate(decoded):
        cells = _read(torch.cat([x, maps[k % len(maps)]], dim=-1), route)
        u, dt, B, C = cells.split([channels, rank, state, state], dim=-1)
        sequences.append((u, F.softplus(F.linear(dt, dt_weight[k], dt_bias[k])), B, C))
    u, delta, B, C = (torch.stack(m, dim=2) for m in zip(*sequences, strict=True))
    y, _ = _outputs(u, delta, A, B, C, D, None)
    return _merge(y, decoded, grid).to(dtype).reshape(shape)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.selective_scan.op.selective_scan`."""
    groups, dtype = B.shape[1], compute_dtype(u, A, initial_state)
    x, dt = (m.to(dtype).permute(2, 0, 1).unflatten(2, (groups, -1)) for m in (u, delta))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype).view(groups, -1)
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (m.to(dtype).permute(3, 0, 1, 2) for m in (B, C))
    skip = None if D is None else D.to(dtype).view(groups, -1)
    initial = None if initial_state is None else initial_state.to(dtype).unflatten(1, (groups, -1))
    y, last = _outputs(x, dt, A.to(dtype).unflatten(0, (groups, -1)), B, C, skip, initial)
    return y.flatten(2).permute(1, 2, 0).to(u.dtype).contiguous(), last.flatten(1, 2)


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.ssd_scan.op.ssd_scan`: matrix products in chunks, a scan over the chunks."""
    dtype, length = compute_dtype(x, A, initial_state), x.shape[1]
    steps = min(STEPS, longest(length))

    def chunks(m: Tensor) -> Tensor:
        """(b, l, ...) in the order of the scan, in chunks: (b, m, q, ...)."""
        m = m.to(dtype).flip(1) if reverse else m.to(dtype)
        return _cut(m.transpose(0, 1), steps).movedim(2, 0)

    k = in_chunks(chunks(x), chunks(dt), A.to(dtype), chunks(B), chunks(C), False)
    leaving = torch.einsum("bcqh,bcqhp,bcqhn->cbhpn", k.leave, k.u, k.B)
    whole = k.whole.transpose(0, 1)[..., None, None]
    initial = torch.zeros_like(leaving[0]) if initial_state is None else initial_state.to(dtype)
    states = scan(whole, torch.cat([leaving[:1] + whole[:1] * initial, leaving[1:]]))
    mixed = torch.einsum("bcthn,bcshn->bchts", k.C, k.B) * k.reach
    y = torch.einsum("bchts,bcshp->cbthp", mixed, k.u)
    y = y + torch.einsum("bcth,bcthn,cbhpn->cbthp", k.enter, k.C, _after(initial[None], states))
    y = y.transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1)
    return (y.flip(1) if reverse else y).to(x.dtype).contiguous(), states[-1].clone()


def linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, resets: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.linear_scan.op.linear_scan`."""
    dtype, times = compute_dtype(a, b, initial_state), multiply if pairs else torch.mul
    decay, entering = a.to(dtype), b.to(dtype)
    decay = decay.view(*[1] * (b.dim() - a.dim()), *a.shape).expand(b.shape[0], *[-1] * (b.dim() - 1))
    if resets is not None:
        decay = torch.where(resets.view(*resets.shape, *[1] * (b.dim() - 2)), 0.0, decay)
    if initial_state is not None:
        first = entering[:1] + times(decay[:1], initial_state.to(dtype)[None])
        entering = torch.cat([first, entering[1:]])
    h = scan(decay, entering, times)
    return h.to(b.dtype).contiguous(), h[-1].clone()
