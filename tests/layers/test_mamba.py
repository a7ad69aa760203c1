"""Mamba's block along the routes of a map."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vision_ssm.kernels import Route, hilbert, raster, selective_scan, tri
from vision_ssm.layers.mamba import AlongRoutes, Mamba, ahead


def sequence(direction, tokens, reverse):
    """Convolution, SiLU and scan of tokens in the order of visiting, as in the paper: (b, l, e) to itself."""
    scan = direction.scan
    taps = direction.conv.weight.flip(-1) if reverse else direction.conv.weight
    u = F.silu(F.conv1d(F.pad(tokens.mT, (3, 0)), taps, direction.conv.bias, groups=tokens.shape[-1]))
    state, rank = scan.A_log.shape[-1], scan.dt_weight.shape[-1]
    dt, B, C = scan.x_proj(u.mT).mT.split([rank, state, state], dim=1)
    delta = F.softplus(scan.dt_weight[0] @ dt + scan.dt_bias[0][:, None])
    return selective_scan(u, delta, -scan.A_log[0].exp(), B, C, scan.D[0]).mT


@pytest.mark.parametrize(
    ("routes", "grid"),
    [(raster(2), (3, 5)), (tri(2), (3, 5)), (tri(3), (2, 3, 4)), (tri(3), (1, 1, 1)), ((Route((0,)),), (7,))],
    ids=str,
)
def test_each_route_is_a_sequence_of_its_own(routes, grid):
    mixer = AlongRoutes(6, state=3, rank=2, routes=routes).double()
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    wanted = torch.zeros_like(x).flatten(1, -2)
    for route, along in zip(routes, mixer.along, strict=True):
        order = route.index(grid)
        wanted[:, order] += sequence(along.direction, x.flatten(1, -2)[:, order], route.reverse)
    assert_close(mixer(x).flatten(1, -2), wanted)


def test_a_block_is_gated():
    block = Mamba(5, mixer=ahead(2), state=2, expand=1.0).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    u, z = block.in_proj(x).split(5, dim=-1)
    assert_close(block(x), block.out_proj(block.mixer(u) * F.silu(z)))
    with torch.no_grad():
        block.in_proj.weight[5:] = 0
    assert not block(x).any()


def test_routes_that_are_no_lines_of_neighbours_are_refused():
    for routes in ((Route((0, 1), stride=2),), hilbert(2)):
        with pytest.raises(ValueError, match="all cells, line by line; got Route"):
            AlongRoutes(4, state=1, rank=1, routes=routes)
    with pytest.raises(ValueError, match="at least one route"):
        AlongRoutes(4, state=1, rank=1, routes=())
