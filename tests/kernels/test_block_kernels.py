"""The Gluon kernels of the routed scan against its reference, on a CPU; a GPU runs them in test_routed_scan.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vision_ssm.kernels import ATROUS, AXIAL_3D, BIDIRECTIONAL, CROSS, ROW

pytest.importorskip("triton")
from vision_ssm.kernels.routed_scan import gpu_blocks
from vision_ssm.kernels.routed_scan.cases import Case, make_inputs
from vision_ssm.kernels.routed_scan.reference import routed_scan_ref
from vision_ssm.kernels.routes import index_table

if not gpu_blocks.HAS_GLUON:
    pytest.skip("this Triton has no Gluon", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("carry_kernel and merge_kernel run in Triton's interpreter here", allow_module_level=True)

KERNELS = ("walk_kernel", "gradient_kernel", "pair_kernel", "pair_walk_kernel", "pair_gradient_kernel")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def machine():
    """The kernels as ``gluon_by_torch`` runs them."""
    spec = importlib.util.spec_from_file_location("gluon_by_torch", Path(__file__).with_name("gluon_by_torch.py"))
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.kernels()
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def without_gpu(machine, monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(gpu_blocks, name, machine[name])
    monkeypatch.setattr(gpu_blocks._Launcher, "__call__", launch)
    gpu_blocks._cached_call.cache_clear()
    yield
    gpu_blocks._cached_call.cache_clear()


def launch(self, *tensors):
    """As the first launch does; nothing is compiled that could be kept."""
    self.function[self.grid](*tensors, *self.numbers, **self.constants)


@pytest.mark.parametrize(
    ("case", "dtype", "units", "scratch"),
    [
        pytest.param(Case(2, (5, 7), 96, 1, 6, CROSS), torch.float16, 1, 2**30, id="pairs"),
        pytest.param(Case(1, (12, 11), 64, 1, 12, CROSS), torch.bfloat16, 8, 2**30, id="pairs, cut"),
        pytest.param(Case(3, (12, 11), 8, 1, 2, CROSS), torch.float16, 8, 2**13, id="pairs, cut, sample by sample"),
        pytest.param(Case(1, (2, 3, 4), 8, 1, 2, AXIAL_3D), torch.float16, 1, 2**30, id="three pairs"),
        pytest.param(Case(1, (6, 8, 6), 8, 1, 2, AXIAL_3D), torch.bfloat16, 1, 2**30, id="three pairs, many blocks"),
        pytest.param(Case(2, (6, 4), 40, 1, 2, BIDIRECTIONAL), torch.float16, 1, 2**30, id="one pair, ragged channels"),
        pytest.param(Case(10, (3, 3), 8, 1, 2, CROSS), torch.float16, 1, 2**10, id="in parts"),
        pytest.param(Case(1, (2, 4), 8, 1, 4, ATROUS, shared=True), torch.float16, 1, 2**30, id="shared columns"),
        pytest.param(Case(2, (4, 6), 64, 1, 48, ATROUS), torch.float16, 1, 2**30, id="direct"),
        pytest.param(Case(2, (3, 3), 8, 1, 3, CROSS), torch.float16, 1, 2**30, id="odd rank"),
        pytest.param(Case(2, (2, 4), 8, 2, 5, ATROUS, shared=True), torch.float16, 1, 2**30, id="odd rank, shared"),
        pytest.param(Case(1, (4, 4), 8, 1, 2, (ROW,)), torch.float16, 1, 2**30, id="one route"),
        pytest.param(Case(1, (4, 4), 8, 1, 2, CROSS[:3]), torch.float16, 1, 2**30, id="no pairs"),
        pytest.param(Case(1, (6, 12), 32, 4, 6, BIDIRECTIONAL), torch.bfloat16, 4, 2**30, id="several states, cut"),
        pytest.param(Case(1, (2, 2), 64, 2, 4, 2 * CROSS), torch.float16, 1, 2**30, id="as many columns as channels"),
    ],
)
def test_values_and_gradients(case, dtype, units, scratch, monkeypatch):
    monkeypatch.setattr(gpu_blocks, "multiprocessors", lambda device: units)
    monkeypatch.setattr(gpu_blocks, "_SCRATCH", dict.fromkeys(gpu_blocks._SCRATCH, scratch))
    compare(case, list(make_inputs(case, dtype, CPU).values()))


def compare(case, inputs):
    """Asserts that values and gradients are those of the reference."""
    dtype = inputs[0].dtype
    y = gpu_blocks.forward(*inputs, case.routes)
    dy = torch.randn(y.shape).to(dtype)
    grads = gpu_blocks.backward(dy, *inputs, case.routes)

    leaves = [m.double().requires_grad_() for m in inputs]
    flat = leaves[0].flatten(1, -2), leaves[1].flatten(1, -2)
    expected = routed_scan_ref(*flat, *leaves[2:], index_table(case.routes, case.grid, CPU)).view(y.shape)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for found, wanted in zip((y, *grads), (expected, *torch.autograd.grad(expected, leaves, dy.double())), strict=True):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(("rows", "piece"), [(1, 3), (2, 2)], ids=["one program", "the last has fewer"])
def test_programs_of_several_segments(rows, piece, monkeypatch):
    """In a backward, where rows of partial gradients would be too many; here of three segments."""
    monkeypatch.setattr(gpu_blocks, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(gpu_blocks, "_ROWS", rows)
    case = Case(1, (12, 11), 8, 1, 2, CROSS)
    inputs = list(make_inputs(case, torch.float16, CPU).values())
    x, low_rank, *weights = inputs
    (part,) = gpu_blocks._call(x, low_rank, weights, CROSS, backward=True).parts
    assert (part.segments, part.piece) == (3, piece)
    compare(case, inputs)


@pytest.mark.parametrize("grid", [(3, 4), (17, 16)], ids=["small", "many blocks"])
def test_a_sum_may_leave_half_precision_on_its_way(grid, monkeypatch):
    """Of two pairs, the first alone is beyond float16's greatest number; one that is infinite remains so."""
    monkeypatch.setattr(gpu_blocks, "multiprocessors", lambda device: 1)
    inputs = make_inputs(Case(1, grid, 8, 1, 2, CROSS), torch.float16, CPU)
    first, second = gpu_blocks.pairs(CROSS, grid)
    inputs["x"] = torch.ones_like(inputs["x"])
    inputs["D"][list(first)], inputs["D"][list(second)] = 40_000.0, -30_000.0
    inputs["D"][:, 1] = torch.inf
    y = gpu_blocks.forward(*inputs.values(), CROSS)
    assert y[..., 1].isinf().all()
    others = torch.cat((y[..., :1], y[..., 2:]), dim=-1).float()
    assert ((others - 20_000).abs() < 500).all()
