"""FLOP formulas, counted by PyTorch's own counter."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vision_ssm  # noqa: F401  registers the models
from vision_ssm.kernels import CROSS, cross_merge, cross_scan, linear_scan, routed_scan, selective_scan, ssd_scan
from vision_ssm.kernels.routed_scan.cases import CASES, make_inputs


def count(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_selective_scan():
    batch, dim, length, state = 2, 3, 5, 4
    u, A, B = torch.rand(batch, dim, length), -torch.rand(dim, state), torch.rand(batch, state, length)
    forward = batch * dim * length * (9 * state + 1)
    assert count(lambda: selective_scan(u, u, A, B, B)) == forward
    leaf = u.clone().requires_grad_()
    assert count(lambda: selective_scan(leaf, u, A, B, B).sum().backward()) == 3 * forward


def test_linear_scan():
    a, b = torch.rand(4, 2), torch.rand(3, 2, 4, 2)
    assert count(lambda: linear_scan(a, b)) == 2 * b.numel()
    assert count(lambda: linear_scan(a, b, pairs=True)) == 8 * b.numel() // 2
    leaf = b.clone().requires_grad_()
    assert count(lambda: linear_scan(a, leaf)[0].sum().backward()) == 3 * 2 * b.numel()


def test_ssd_scan():
    batch, length, heads, width, state = 2, 5, 3, 4, 6
    x, dt, A = torch.rand(batch, length, heads, width), torch.rand(batch, length, heads), -torch.rand(heads)
    B = torch.rand(batch, length, 1, state)
    forward = batch * length * heads * (width * (5 * state + 1) + 2)
    assert count(lambda: ssd_scan(x, dt, A, B, B)) == forward
    leaf = x.clone().requires_grad_()
    assert count(lambda: ssd_scan(leaf, dt, A, B, B)[0].sum().backward()) == 3 * forward


def test_routed_scan():
    case = CASES["prime_grid"]
    inputs = make_inputs(case, torch.float32, "cpu")
    steps = case.batch * len(case.routes) * case.grid[0] * case.grid[1]
    forward = steps * case.channels * (2 * case.rank + 9 * case.state + 1)
    assert count(lambda: routed_scan(**inputs, routes=CROSS)) == forward
    inputs["x"].requires_grad_()
    assert count(lambda: routed_scan(**inputs, routes=CROSS).sum().backward()) == 3 * forward


def test_cross_scan_only_moves_and_merge_adds():
    x = torch.rand(2, 3, 4, 5)
    assert count(lambda: cross_scan(x, CROSS)) == 0
    y = cross_scan(x, CROSS)
    assert count(lambda: cross_merge(y, CROSS, (4, 5))) == 2 * 3 * 3 * 20


def test_vmamba_tiny_is_near_its_paper():
    """The paper's table says 4.9 G for s1l8, a multiplication with its addition counted once outside the scan."""
    model = timm.create_model("vmamba_tiny").eval()
    with torch.no_grad():
        total = count(lambda: model(torch.zeros(1, 3, 224, 224)))
    with torch.no_grad():
        twin = count(lambda: timm.create_model("vmamba_tiny", mixer="identity").eval()(torch.zeros(1, 3, 224, 224)))
    assert 4.4e9 < total / 2 < 5.2e9
    assert twin < total
