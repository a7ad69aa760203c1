import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vision_ssm.kernels import ATROUS, AXIAL_3D, BIDIRECTIONAL, CROSS, HILBERT_3D, ROW, cross_merge, cross_scan, hilbert
from vision_ssm.kernels.cross_scan import gpu
from vision_ssm.kernels.cross_scan.reference import cross_merge_ref, cross_scan_ref
from vision_ssm.kernels.routes import index_table

CASES = [
    (CROSS, (1, 1)),
    (CROSS, (5, 7)),
    (CROSS, (1, 6)),
    (BIDIRECTIONAL, (3, 4)),
    (ATROUS, (4, 6)),
    (AXIAL_3D, (2, 3, 4)),
    (HILBERT_3D, (3, 2, 4)),
    ((ROW, *hilbert(2)), (3, 5)),
]
IDS = [f"{len(routes)}_routes_{grid}" for routes, grid in CASES]


def tensors(routes, grid, device="cpu", dtype=torch.float64):
    length = routes[0].length(grid)
    x = torch.randn(2, 3, *grid, dtype=dtype, device=device, requires_grad=True)
    y = torch.randn(2, len(routes), 3, length, dtype=dtype, device=device, requires_grad=True)
    return x, y, index_table(routes, grid, torch.device(device))


@pytest.mark.parametrize(("routes", "grid"), CASES, ids=IDS)
def test_equals_reference_and_is_adjoint(routes, grid, device):
    x, y, index = tensors(routes, grid, device)
    cells = math.prod(grid)
    scanned, merged = cross_scan(x, routes), cross_merge(y, routes, grid)
    assert torch.equal(scanned, cross_scan_ref(x.flatten(2), index))
    assert_close(merged.flatten(2), cross_merge_ref(y, index, cells))
    assert_close((scanned * y).sum(), (x * merged).sum())
    assert_close(torch.autograd.grad(scanned, x, y)[0], merged)
    assert_close(torch.autograd.grad(merged, y, x)[0], scanned)


@pytest.mark.parametrize(("routes", "grid"), CASES, ids=IDS)
def test_triton_equals_reference(routes, grid, device):
    x, y, index = tensors(routes, grid, device, torch.float32)
    assert torch.equal(gpu.cross_scan(x.detach(), routes), cross_scan_ref(x.detach().flatten(2), index))
    merged = gpu.cross_merge(y.detach(), routes, grid)
    assert_close(merged.flatten(2), cross_merge_ref(y.detach(), index, math.prod(grid)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merge_adds_in_float32(dtype):
    _, y, index = tensors(CROSS, (5, 7), dtype=dtype)
    exact = cross_merge_ref(y.double(), index, 35)
    assert_close(cross_merge(y, CROSS, (5, 7)).flatten(2), exact.to(dtype), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
def test_opcheck():
    x, y, _ = tensors(CROSS, (3, 4), dtype=torch.float32)
    code = torch.ops.vision_ssm
    from vision_ssm.kernels.routes import encode

    torch.library.opcheck(code.cross_scan.default, (x, encode(CROSS)))
    torch.library.opcheck(code.cross_merge.default, (y, encode(CROSS), [3, 4]))


@pytest.mark.parametrize("name", ["1x1", "1x6", "2x3", "3x5", "4x4", "5x7", "6x1", "8x6"])
def test_golden_file(name, golden_file, device):
    golden = {
        key: torch.from_numpy(m).to(device)
        for key, m in np.load(golden_file(f"ops/cross_scan/grid_{name}.npz")).items()
    }
    x, y = golden["x"], golden["y"]
    grid = tuple(x.shape[2:])
    assert torch.equal(cross_scan(x, CROSS), golden["cross2d_scan_x"])
    assert_close(cross_merge(y.flatten(3), CROSS, grid), golden["cross2d_merge_y"].unflatten(2, grid))

    padded = torch.nn.functional.pad(x, (0, grid[1] % 2, 0, grid[0] % 2))
    assert torch.equal(cross_scan(padded, ATROUS), golden["atrous_scan_x"])
    merged = cross_merge(golden["atrous_y"], ATROUS, tuple(padded.shape[2:]))
    assert_close(merged[..., : grid[0], : grid[1]].flatten(2), golden["atrous_merge_y"].flatten(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_scan(torch.zeros(1, 2, 3, 5), ATROUS), "multiple of 2"),
        (lambda: cross_scan(torch.zeros(1, 2, 3, 5, dtype=torch.int64), CROSS), "floating point"),
        (lambda: cross_scan(torch.zeros(1, 2, 0, 5), CROSS), "empty"),
        (lambda: cross_scan(torch.zeros(1, 2, 3), CROSS), "1-D grid"),
        (lambda: cross_merge(torch.zeros(1, 4, 2, 14), CROSS, (3, 5)), "length=15"),
        (lambda: cross_merge(torch.zeros(1, 2, 15), CROSS, (3, 5)), "batch, routes, channels, length"),
    ],
)
def test_errors_say_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
