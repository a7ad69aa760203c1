import os
from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels import ATROUS, BIDIRECTIONAL, CROSS, HILBERT, ROW, Route, recurrence, routed_scan
from vision_ssm.kernels.routed_scan import gpu
from vision_ssm.kernels.routed_scan.cases import CASES, SMALL, Case, make_inputs
from vision_ssm.kernels.routed_scan.reference import routed_scan_ref
from vision_ssm.kernels.routes import COLUMN, COLUMN_BACK, ROW_BACK, encode, index_table


def relative_error(have, want):
    return ((have.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def reference(routes, **inputs):
    """The equation, always on the CPU: there its many small steps are faster, and on a GPU the gradient of torch's
    indexing, in its deterministic mode, was seen to be wrong for a route of one cell that is taken twice."""
    device, (x, low_rank, *weights) = inputs["x"].device, (m.cpu() for m in inputs.values())
    index = index_table(routes, tuple(x.shape[1:-1]), x.device)
    return routed_scan_ref(x.flatten(1, -2), low_rank.flatten(1, -2), *weights, index).view(x.shape).to(device)


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
    """In the interpreter, tiles and scratch so small that a few channels, states and samples make several of each."""
    if device.type == "cpu":

        def block_sizes(channels, state, rank, backward):
            blocks = {"BLOCK_M": 16, "BLOCK_D": 8, "BLOCK_N": min(2, triton.next_power_of_2(state)), "BLOCK_R": 16}
            return {**blocks, "num_warps": 1}

        monkeypatch.setattr(gpu, "block_sizes", block_sizes)
        monkeypatch.setattr(gpu, "_SCRATCH", {"forward": 1, "backward": 1})
        monkeypatch.setattr(gpu, "_cached_call", gpu._Call)


def check_triton(case, dtype, device, values=1e-5, gradients=1e-4, change=lambda inputs: inputs, vanishing=1e-30):
    """The error of a gradient is relative to its norm, or to ``vanishing`` if that is more."""
    inputs = change(make_inputs(case, dtype, device))
    want = run(reference, {key: m.double() for key, m in inputs.items()}, case.routes)
    y = gpu.forward(*inputs.values(), case.routes)
    assert y.dtype == dtype and relative_error(y, want["y"]) < values
    dy = torch.randn(want["y"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    grads = gpu.backward(dy.to(inputs["x"]), *inputs.values(), case.routes)
    for (key, m), have in zip(inputs.items(), grads, strict=True):
        assert have.dtype == m.dtype and have.isfinite().all(), key
        exact = want[f"d{key}"]
        assert (have - exact).norm() <= gradients * exact.norm().clamp(min=vanishing), key


@pytest.mark.parametrize("name", SMALL)
def test_triton_equals_reference(name, small_blocks, device):
    check_triton(CASES[name], torch.float32, device)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, (2, 33), 3, 1, 1, (ROW, ROW_BACK)),
        Case(1, (19, 2), 3, 1, 1, (COLUMN, COLUMN_BACK)),
        Case(2, (3, 3), 4, 2, 1, (ATROUS[0],)),
        Case(1, (3, 4), 4, 1, 2, (ROW, Route((0, 1), stride=1), COLUMN_BACK)),
        Case(1, (4, 4), 3, 1, 1, (ATROUS[0], ATROUS[3], ATROUS[1])),
        Case(1, (19,), 3, 3, 2, (Route((0,)), Route((0,), reverse=True))),
        Case(2, (5, 7), 3, 1, 1, (HILBERT[1], COLUMN, HILBERT[0])),
        Case(1, (6, 4), 3, 1, 1, tuple(replace(route, hilbert=True) for route in ATROUS)),
    ],
    ids=["wide", "high", "not all cells", "a route twice", "some paths apart", "one axis", "curve and lines", "curves"],
)
def test_triton_takes_any_routes(case, small_blocks, device, monkeypatch):
    monkeypatch.setattr(gpu, "_PROGRAMS", 10**6)  # runs as short as they get
    check_triton(case, torch.float32, device)


@pytest.mark.parametrize(
    ("scale", "bias"), [(1e4, 0.0), (0.0, -1e4), (1.0, 60.0)], ids=["decay underflows", "zero delta", "large delta"]
)
def test_triton_extremes(scale, bias, small_blocks, device):
    def change(inputs):
        return {**inputs, "A": inputs["A"] * scale, "dt_bias": inputs["dt_bias"] + bias}

    check_triton(Case(1, (4, 5), 3, 2, 1), torch.float32, device, change=change)


@pytest.mark.parametrize("name", ["low_rank", "A"])
def test_triton_with_one_tensor_in_float64(name, small_blocks, device):
    def change(inputs):
        return {**inputs, name: inputs[name].double()}

    check_triton(Case(1, (3, 5), 4, 2, 2, BIDIRECTIONAL), torch.float32, device, change=change)


def test_triton_keeps_a_bad_column_to_its_route(small_blocks, device):
    """A C that is NaN spoils one cell of y and nothing after it; C's column lies beside those of Δ."""
    case = Case(1, (1, 9), 3, 1, 2, (ROW,))
    inputs = make_inputs(case, torch.float32, device)
    want = gpu.forward(*inputs.values(), case.routes)
    inputs["low_rank"][0, 0, 4, 3] = float("nan")
    have = gpu.forward(*inputs.values(), case.routes)
    assert not have[0, 0, 4].isfinite().any()
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(have[:, :, kept], want[:, :, kept])


def test_triton_in_float64(small_blocks, device):
    check_triton(Case(1, (3, 5), 4, 2, 2, BIDIRECTIONAL), torch.float64, device, values=1e-12, gradients=1e-12)


@pytest.mark.parametrize(
    ("dtype", "values", "gradients"),
    [(torch.float16, 2e-3, 4e-3), (torch.bfloat16, 1e-2, 2e-2)],
    ids=["float16", "bfloat16"],
)
def test_triton_in_half_precision(dtype, values, gradients, small_blocks, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 matrices as integers")
    check_triton(Case(2, (3, 5), 9, 1, 2, BIDIRECTIONAL), dtype, device, values, gradients)


# Each of these is compiled for itself, which takes seconds; grids and routes are not.
LAYERS = [
    (torch.float32, 33, 1, 3),
    (torch.float16, 96, 1, 6),
    (torch.float16, 40, 1, 3),
    (torch.bfloat16, 130, 1, 40),
    (torch.bfloat16, 64, 2, 4),
    (torch.float32, 17, 5, 2),
    (torch.float16, 24, 16, 2),
    (torch.float32, 1, 64, 1),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter's cases are above")
@given(
    grid=st.one_of(
        st.tuples(st.integers(1, 33), st.integers(1, 33)),
        st.tuples(*(st.integers(1, 8),) * 3),
        st.tuples(st.integers(1, 400)),
    ),
    stride=st.sampled_from([1, 1, 2, 3]), batch=st.integers(1, 3), layer=st.sampled_from(LAYERS), data=st.data(),
)  # fmt: skip
@settings(  # VSSM_FUZZ_CASES=2000 draws that many cases, others each time
    max_examples=int(os.environ.get("VSSM_FUZZ_CASES", "50")), derandomize="VSSM_FUZZ_CASES" not in os.environ
)
def test_fuzz(grid, stride, batch, layer, data):
    dtype, channels, state, rank = layer
    values, gradients = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}[dtype]
    axes, offset = st.permutations(range(len(grid))).map(tuple), st.tuples(*(st.integers(0, stride - 1) for _ in grid))
    route = st.builds(Route, axes, reverse=st.booleans(), stride=st.just(stride), offset=offset)
    routes = data.draw(st.lists(route, min_size=1, max_size=8).map(tuple))
    padded = tuple(stride * size for size in grid)  # so that every route has as many steps
    # A single number that hundreds of random ones have left is all rounding where they cancel out.
    check_triton(Case(batch, padded, channels, state, rank, routes), dtype, "cuda", values, gradients, vanishing=0.1)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's grid has such a limit")
def test_more_samples_than_a_grid_axis_holds():
    case = Case(70_000, (1, 2), 3, 1, 1)
    inputs = make_inputs(case, torch.float32, "cuda")
    want = run(reference, inputs, CROSS)
    for key, have in run(routed_scan, inputs, CROSS).items():
        assert relative_error(have, want[key]) < (1e-4 if key.startswith("d") else 1e-5), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 30 GB of a GPU's memory")
def test_more_elements_than_32_bits_count():
    """The last of so many samples is what it is alone; it is the one whose offsets do not fit."""
    case = Case(23, (1024, 1024), 96, 1, 6)
    weights = make_inputs(replace(case, batch=1, grid=(1, 1)), torch.float16, "cuda")
    x = torch.randn(case.batch, *case.grid, case.channels, device="cuda", dtype=torch.float16)
    low_rank = torch.randn(case.batch, *case.grid, 32, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    inputs = {**weights, "x": x, "low_rank": low_rank}
    alone = {**weights, "x": x[-1:].clone(), "low_rank": low_rank[-1:].clone()}
    with torch.no_grad():
        assert relative_error(routed_scan(**inputs, routes=CROSS)[-1], routed_scan(**alone, routes=CROSS)[0]) < 1e-3
    dy = torch.randn_like(alone["x"])
    everywhere = torch.zeros_like(x)
    everywhere[-1:] = dy
    grads = gpu.backward(everywhere, *inputs.values(), CROSS)
    for have, want in zip(grads, gpu.backward(dy, *alone.values(), CROSS), strict=True):
        last = have[-1:] if have.shape[0] == case.batch else have
        assert relative_error(last, want) < 1e-3


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


@pytest.mark.parametrize("grid", [[], [5, 7]], ids=["map", "list of cells"])
def test_what_autograd_adds_needs_no_map_of_its_own(grid, device):
    """Autograd adds to a gradient in its place unless that is a view."""
    inputs = list(make_inputs(CASES["prime_grid"], torch.float32, device).values())
    if grid:
        inputs[:2] = (m.flatten(1, -2) for m in inputs[:2])
    grads = torch.ops.vision_ssm.routed_scan_backward(inputs[0], *inputs, encode(CROSS), grid)
    assert not any(grad._is_view() for grad in grads[:2])
    assert [grad.shape for grad in grads] == [m.shape for m in inputs]


def test_an_order_first_asked_for_in_inference_serves_gradients():
    index_table.cache_clear()
    with torch.inference_mode():
        index_table(CROSS, (3, 2), torch.device("cpu"))
    run(reference, make_inputs(Case(1, (3, 2), 2, 1, 1), torch.float64, "cpu"), CROSS)


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


@pytest.mark.parametrize("name", ["prime_grid", "atrous", "volume", "curve_volume"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
def test_opcheck(name):
    case = CASES[name]
    x, low_rank, *weights = make_inputs(case, torch.float32, "cpu").values()
    tensors = [m.requires_grad_() for m in (x.flatten(1, -2), low_rank.flatten(1, -2), *weights)]
    code = encode(case.routes)
    torch.library.opcheck(torch.ops.vision_ssm.routed_scan.default, (*tensors, code, list(case.grid)))
    tensors[:2] = [m.detach().view(case.batch, *case.grid, -1).requires_grad_() for m in tensors[:2]]
    torch.library.opcheck(torch.ops.vision_ssm.routed_scan.default, (*tensors, code, []))


@pytest.mark.parametrize("routes", [CROSS, HILBERT], ids=["cross", "hilbert"])
def test_one_compilation_serves_every_size(routes):
    sizes = []

    def count(graph, inputs):
        sizes.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *m: routed_scan(*m, routes), fullgraph=True, dynamic=True, backend=count)
    for grid in ((5, 7), (9, 13), (6, 17)):  # sizes that no other axis has, which PyTorch would tie to it
        inputs = make_inputs(Case(2, grid, 11, 3, 3, routes), torch.float32, "cpu")
        assert torch.equal(compiled(*inputs.values()), routed_scan(*inputs.values(), routes))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 7, 6, dtype=torch.int32)}, "x must be real floating point"),
        ({"low_rank": torch.zeros(2, 5, 7, 31)}, r"routes\*\(rank\+2\*state\)=32"),
        ({"low_rank": torch.zeros(2, 7, 5, 32)}, r"grid0=5, grid1=7, .*got \(2, 7, 5, 32\)"),
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
