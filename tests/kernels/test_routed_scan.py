import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels import ATROUS, BIDIRECTIONAL, CROSS, ROW, recurrence, routed_scan
from vision_ssm.kernels.routed_scan import gpu
from vision_ssm.kernels.routed_scan.cases import CASES, SMALL, Case, make_inputs
from vision_ssm.kernels.routed_scan.reference import routed_scan_ref
from vision_ssm.kernels.routes import encode, index_table


def relative_error(have, want):
    return ((have.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def reference(routes, **inputs):
    x, low_rank, *weights = inputs.values()
    index = index_table(routes, tuple(x.shape[1:-1]), x.device)
    return routed_scan_ref(x.flatten(1, -2), low_rank.flatten(1, -2), *weights, index).view(x.shape)


def run(scan, inputs, routes):
    leaves = {name: m.detach().requires_grad_() for name, m in inputs.items()}
    y = scan(**leaves, routes=routes)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.fixture(params=["numba", "torch"])
def recurrence_backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(recurrence, "HAS_NUMBA", request.param == "numba")


@pytest.mark.parametrize("name", SMALL)
def test_equals_reference_in_float64(name, recurrence_backend, device):
    inputs = make_inputs(CASES[name], torch.float64, device)
    want = run(reference, inputs, CASES[name].routes)
    for key, have in run(routed_scan, inputs, CASES[name].routes).items():
        assert_close(have, want[key], rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("dtype", "values", "gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 2e-3, 4e-3), (torch.bfloat16, 1e-2, 2e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_precision(name, dtype, values, gradients, device):
    inputs = make_inputs(CASES[name], dtype, device)
    exact = run(reference, {key: m.double() for key, m in inputs.items()}, CASES[name].routes)
    for key, have in run(routed_scan, inputs, CASES[name].routes).items():
        assert relative_error(have, exact[key]) <= (gradients if key.startswith("d") else values), key


@pytest.fixture
def small_blocks(monkeypatch, device):
    """In the interpreter, tiles so small that a short sequence has several chunks and a few channels several blocks."""
    if device.type == "cpu":
        blocks = {"BLOCK_L": 8, "BLOCK_D": 4, "num_warps": 1}
        monkeypatch.setattr(gpu, "block_sizes", lambda *sizes: {**blocks, "BLOCK_N": triton.next_power_of_2(sizes[-1])})


@pytest.mark.parametrize("name", SMALL)
def test_triton_equals_reference(name, small_blocks, device):
    case = CASES[name]
    inputs = make_inputs(case, torch.float32, device)
    want = run(reference, {key: m.double() for key, m in inputs.items()}, case.routes)
    assert relative_error(gpu.forward(*inputs.values(), case.routes), want["y"]) < 1e-5
    dy = torch.randn(want["y"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    grads = gpu.backward(dy.to(inputs["x"]), *inputs.values(), case.routes)
    for key, have in zip(inputs, grads, strict=True):
        assert relative_error(have, want[f"d{key}"]) < 1e-4, key


@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)), channels=st.integers(1, 5), state=st.sampled_from([1, 2, 5]),
    rank=st.integers(1, 3), routes=st.sampled_from([CROSS, BIDIRECTIONAL, (ROW,)]),
)  # fmt: skip
def test_any_shape(grid, channels, state, rank, routes):
    inputs = make_inputs(Case(2, grid, channels, state, rank, routes), torch.float64, "cpu")
    have, want = run(routed_scan, inputs, routes), run(reference, inputs, routes)
    for key in want:
        assert_close(have[key], want[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("routes", [CROSS, ATROUS], ids=["cross", "atrous"])
def test_gradcheck(routes):
    inputs = make_inputs(Case(1, (2, 4), 2, 2, 1, routes), torch.float64, "cpu")
    leaves = [m.requires_grad_() for m in inputs.values()]
    torch.autograd.gradcheck(lambda *m: routed_scan(*m, routes), leaves)


@pytest.mark.parametrize(
    ("scale", "bias"), [(1e4, 0.0), (0.0, -1e4), (1.0, 60.0)], ids=["decay underflows", "zero delta", "large delta"]
)
def test_extremes_stay_finite(scale, bias):
    inputs = make_inputs(Case(1, (4, 5), 3, 2, 1), torch.float32, "cpu")
    inputs["A"] = inputs["A"] * scale
    inputs["dt_bias"] = inputs["dt_bias"] + bias
    exact = run(reference, {key: m.double() for key, m in inputs.items()}, CROSS)
    for key, have in run(routed_scan, inputs, CROSS).items():
        assert have.isfinite().all()
        assert relative_error(have, exact[key]) < 1e-4 or exact[key].abs().max() < 1e-30, key


def test_unvisited_cells_are_zero():
    routes = (ATROUS[0],)
    inputs = make_inputs(Case(1, (4, 4), 3, 2, 1, routes), torch.float64, "cpu")
    y = routed_scan(**inputs, routes=routes)
    assert y[:, 1::2].abs().max() == 0 and y[:, :, 1::2].abs().max() == 0
    assert y[:, ::2, ::2].abs().min() > 0


def test_two_runs_are_equal(device):
    inputs = make_inputs(CASES["prime_grid"], torch.float32, device)
    first, second = run(routed_scan, inputs, CROSS), run(routed_scan, inputs, CROSS)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_autocast_does_not_reach_the_scan():
    inputs = make_inputs(CASES["prime_grid"], torch.float32, "cpu")
    plain = run(routed_scan, inputs, CROSS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(routed_scan, inputs, CROSS)
    assert all(torch.equal(plain[key], cast[key]) for key in plain)


def test_strided_inputs_and_gradients():
    inputs = make_inputs(CASES["prime_grid"], torch.float64, "cpu")
    strided = {name: m.transpose(-1, -2).contiguous().transpose(-1, -2) for name, m in inputs.items()}
    have, want = run(routed_scan, strided, CROSS), run(routed_scan, inputs, CROSS)
    assert all(torch.equal(have[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["prime_grid", "atrous", "volume"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
def test_opcheck(name):
    inputs = make_inputs(CASES[name], torch.float32, "cpu")
    code = encode(CASES[name].routes)
    tensors = [m.requires_grad_() for m in inputs.values()]
    torch.library.opcheck(torch.ops.vision_ssm.routed_scan.default, (*tensors, code))


def test_one_compilation_serves_every_size():
    sizes = []

    def count(graph, inputs):
        sizes.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *m: routed_scan(*m, CROSS), fullgraph=True, dynamic=True, backend=count)
    for grid in ((5, 7), (9, 13), (6, 17)):  # sizes that no other axis has, which PyTorch would tie to it
        inputs = make_inputs(Case(2, grid, 11, 3, 3), torch.float32, "cpu")
        assert torch.equal(compiled(*inputs.values()), routed_scan(*inputs.values(), CROSS))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 7, 6, dtype=torch.int32)}, "x must be real floating point"),
        ({"low_rank": torch.zeros(2, 5, 7, 31)}, r"routes\*\(rank\+2\*state\)=32"),
        ({"low_rank": torch.zeros(2, 7, 5, 32)}, "grid0=5, grid1=7"),
        ({"dt_weight": torch.zeros(4, 6)}, "dt_weight must have shape"),
        ({"A": torch.zeros(4, 5, 3)}, "A must have shape .*channels=6"),
        ({"D": torch.zeros(3, 6)}, "D must have shape .*routes=4"),
        ({"D": torch.zeros(4, 6, device="meta")}, "one device"),
        ({"x": torch.zeros(2, 35, 6)}, "1-D grid"),
        ({"x": torch.zeros(0, 5, 7, 6)}, "empty"),
        ({"routes": ATROUS}, "multiple of 2"),
        ({"routes": "cross"}, "tuple of Route"),
        ({"routes": BIDIRECTIONAL}, r"routes\*\(rank\+2\*state\)=16"),
    ],
)
def test_errors_say_what_is_accepted(change, message):
    inputs = {**make_inputs(CASES["prime_grid"], torch.float32, "cpu"), "routes": CROSS}
    with pytest.raises(ValueError, match=message):
        routed_scan(**{**inputs, **change})
