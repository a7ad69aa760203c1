import json

import numpy as np
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels import recurrence, selective_scan
from vision_ssm.kernels.selective_scan import cpu, gpu
from vision_ssm.kernels.selective_scan.cases import CASES, Case, make_inputs
from vision_ssm.kernels.selective_scan.reference import selective_scan_ref

SMALL = [name for name in CASES if name != "vim_tiny"]
OPTIONAL = ("D", "delta_bias", "initial_state")


def relative_error(have, want):
    return ((have.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def with_state(case, dtype, device="cpu"):
    inputs = make_inputs(case, dtype, device)
    state = torch.randn(case.batch, case.dim, case.state, dtype=torch.float64)
    return {**inputs, "initial_state": state.to(device, torch.promote_types(dtype, torch.float32))}


def run(scan, inputs, **options):
    """Output, last state and every gradient for fixed random gradients of both."""
    leaves = {name: m.detach().requires_grad_() for name, m in inputs.items()}
    y, last = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = (torch.randn(m.shape, generator=generator, dtype=torch.float64).bfloat16().to(m) for m in (y, last))
    grads = torch.autograd.grad([y, last], list(leaves.values()), [dy, dlast], allow_unused=True)
    return {"y": y, "last": last, **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def op(**inputs):
    return selective_scan(**inputs, delta_softplus=True, return_last_state=True)


def reference(**inputs):
    return selective_scan_ref(**inputs, delta_softplus=True)


@pytest.fixture(params=["numba", "torch"])
def recurrence_backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(recurrence, "HAS_NUMBA", request.param == "numba")


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_float64(name, recurrence_backend, device):
    # on a CPU the published layer with fewer channels
    case = Case(1, 24, 197, 16) if name == "vim_tiny" and device.type == "cpu" else CASES[name]
    inputs = with_state(case, torch.float64, device)
    want = run(reference, inputs)
    for key, have in run(op, inputs).items():
        assert_close(have, want[key], rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("dtype", "values", "gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 2e-3, 4e-3), (torch.bfloat16, 1e-2, 2e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_precision(name, dtype, values, gradients, device):
    inputs = with_state(CASES[name], dtype, device)
    exact = run(reference, {key: m.double() for key, m in inputs.items()})
    for key, have in run(op, inputs).items():
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
    inputs = with_state(
        Case(min(case.batch, 2), case.dim, min(case.length, 40), case.state, case.groups), torch.float32, device
    )
    state = inputs.pop("initial_state")
    args = (*inputs.values(), True, state)
    y, last = gpu.forward(*args)
    want_y, want_last = cpu.forward(*(m.double().cpu() if isinstance(m, torch.Tensor) else m for m in args))
    assert relative_error(y.cpu(), want_y) < 1e-5
    assert relative_error(last.cpu(), want_last) < 1e-5

    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    want = cpu.backward(*(m.double().cpu() if isinstance(m, torch.Tensor) else m for m in (dy, dlast, *args)))
    for position, (have, grad) in enumerate(zip(gpu.backward(dy, dlast, *args), want, strict=True)):
        assert relative_error(have.cpu(), grad) < 1e-4, position


def test_triton_without_optional_inputs(device):
    inputs = make_inputs(CASES["one_channel"], torch.float32, device)
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    delta = delta.abs()
    y, _ = gpu.forward(u, delta, A, B, C, None, None, False, None)
    assert relative_error(y, selective_scan_ref(u, delta, A, B, C)[0]) < 1e-5
    tensors = (y, torch.zeros_like(A)[None], u, delta, A, B, C)
    grads = gpu.backward(*tensors, None, None, False, None)
    want = cpu.backward(*(m.cpu() for m in tensors), None, None, False, None)
    for have, grad in zip(grads[:5], want[:5], strict=True):
        assert relative_error(have.cpu(), grad) < 1e-4


@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), width=st.integers(1, 4), length=st.integers(1, 40),
    state=st.sampled_from([1, 2, 5]), softplus=st.booleans(), given_=st.sets(st.sampled_from(OPTIONAL)),
)  # fmt: skip
def test_any_shape_and_option(batch, groups, width, length, state, softplus, given_):
    inputs = with_state(Case(batch, groups * width, length, state, groups), torch.float64)
    if not softplus:
        inputs["delta"] = inputs["delta"].exp()
        given_ = given_ - {"delta_bias"}
    inputs = {name: m for name, m in inputs.items() if name not in OPTIONAL or name in given_}
    have = run(lambda **k: selective_scan(**k, delta_softplus=softplus, return_last_state=True), inputs)
    want = run(lambda **k: selective_scan_ref(**k, delta_softplus=softplus), inputs)
    for key in want:
        assert_close(have[key], want[key], rtol=1e-9, atol=1e-11)


def test_gradcheck():
    inputs = with_state(Case(1, 4, 5, 2, 2), torch.float64)
    leaves = [m.requires_grad_() for m in inputs.values()]
    torch.autograd.gradcheck(lambda *m: op(**dict(zip(inputs, m, strict=True))), leaves)


def test_strided_inputs_and_gradients():
    inputs = with_state(CASES["prime_length"], torch.float64)
    strided = {
        name: m.transpose(-1, -2).contiguous().transpose(-1, -2) if m.dim() > 1 else m for name, m in inputs.items()
    }
    assert not strided["u"].is_contiguous()
    for key, have in run(op, strided).items():
        assert_close(have, run(op, inputs)[key], rtol=0, atol=1e-14)


def test_two_runs_are_equal():
    inputs = with_state(CASES["state_16"], torch.float32)
    first, second = run(op, inputs), run(op, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_state_carries_over():
    inputs = make_inputs(CASES["prime_length"], torch.float64, "cpu")
    whole, last = op(**inputs)
    cut = 41
    head = {name: m[..., :cut] if m.dim() > 2 else m for name, m in inputs.items()}
    tail = {name: m[..., cut:] if m.dim() > 2 else m for name, m in inputs.items()}
    first, state = op(**head)
    second, end = op(**tail, initial_state=state)
    assert_close(torch.cat([first, second], -1), whole)
    assert_close(end, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_the_scan(dtype):
    inputs = make_inputs(CASES["state_16"], torch.float32, "cpu")
    u = inputs["u"].requires_grad_()
    plain = selective_scan(**inputs, delta_softplus=True)
    with torch.autocast("cpu", dtype=dtype):
        cast = selective_scan(**inputs, delta_softplus=True)
        grad = torch.autograd.grad(cast.sum(), u)[0]
    assert torch.equal(plain, cast)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), u)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
def test_opcheck():
    inputs = with_state(Case(1, 4, 5, 2, 2), torch.float32)
    state = inputs.pop("initial_state").requires_grad_()
    tensors = [m.requires_grad_() for m in inputs.values()]
    torch.library.opcheck(torch.ops.vision_ssm.selective_scan.default, (*tensors, True, state))
    torch.library.opcheck(torch.ops.vision_ssm.selective_scan.default, (*tensors[:5], None, None, False, None))


def test_compiles_without_a_graph_break():
    inputs = make_inputs(CASES["state_16"], torch.float32, "cpu")
    compiled = torch.compile(lambda **k: selective_scan(**k, delta_softplus=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), selective_scan(**inputs, delta_softplus=True))


GOLDEN = """
    all_zero_delta base batch1_dim1 constant_BC gated_z large_delta large_delta_softplus len1 len_prime_31
    mixed_extremes nosoftplus nosoftplus_bias slow_decay_long state1 state16_groups4 state2 tiny_delta_softplus
    ungrouped_3d_BC zero_delta
"""


@pytest.mark.parametrize("name", GOLDEN.split())
def test_golden_file(name, golden_file):
    arrays = {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/selective_scan/{name}.npz")).items()}
    softplus = json.loads(golden_file(f"ops/selective_scan/{name}.json").read_text())["delta_softplus"]
    names = [key for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if key in arrays]
    leaves = {key: arrays[key].requires_grad_() for key in names}
    y, last = selective_scan(**leaves, delta_softplus=softplus, return_last_state=True)
    assert_close(y, arrays["y"], rtol=1e-10, atol=1e-12)
    assert_close(last, arrays["last_state"], rtol=1e-10, atol=1e-12)
    plain = torch.autograd.grad(y, list(leaves.values()), arrays["dy"], retain_graph=True)
    both = torch.autograd.grad([y, last], list(leaves.values()), [arrays["dy"], arrays["dlast_state"]])
    for key, grad, grad2 in zip(names, plain, both, strict=True):
        scale = arrays[f"grad_{key}"].abs().max().item()
        assert_close(grad, arrays[f"grad_{key}"], rtol=1e-10, atol=1e-10 * scale + 1e-300)
        if f"grad2_{key}" in arrays:
            assert_close(grad2, arrays[f"grad2_{key}"], rtol=1e-10, atol=1e-10 * scale + 1e-300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the float32 of a GPU; float64 on a CPU is above")
@pytest.mark.parametrize("name", GOLDEN.split())
def test_golden_file_on_a_gpu(name, golden_file):
    arrays = {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/selective_scan/{name}.npz")).items()}
    softplus = json.loads(golden_file(f"ops/selective_scan/{name}.json").read_text())["delta_softplus"]
    names = [key for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if key in arrays]
    leaves = {key: arrays[key].float().cuda().requires_grad_() for key in names}
    y, last = selective_scan(**leaves, delta_softplus=softplus, return_last_state=True)
    grads = torch.autograd.grad(y, list(leaves.values()), arrays["dy"].float().cuda())
    pairs = [(y, arrays["y"], 1e-5), (last, arrays["last_state"], 1e-5)]
    pairs += [(grad, arrays[f"grad_{key}"], 1e-4) for key, grad in zip(names, grads, strict=True)]
    for have, want, tolerance in pairs:
        assert (have.cpu().double() - want).norm() <= tolerance * want.norm() + 1e-30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5, 33, dtype=torch.int64)}, "u must be real floating point; got torch.int64"),
        ({"A": torch.zeros(5, 1, dtype=torch.complex64)}, "A must be real floating point; got torch.complex64"),
        ({"delta": torch.zeros(2, 5, 32)}, r"delta must have shape \(batch=2, dim=5, length=33\)"),
        ({"B": torch.zeros(2, 1, 3, 33)}, "B must have shape .*state=1"),
        ({"C": torch.zeros(2, 2, 1, 33)}, "B must have shape .*groups dividing"),
        ({"D": torch.zeros(4)}, r"D must have shape \(dim=5\)"),
        ({"z": torch.zeros(2, 5, 32)}, "z must have shape"),
        ({"delta": torch.zeros(2, 5, 33, dtype=torch.float16)}, "share one dtype"),
        ({"u": torch.zeros(2, 5, 33, device="meta")}, "one device"),
        ({"u": torch.zeros(2, 5)}, "batch, dim, length"),
        ({"initial_state": torch.zeros(2, 5, 2)}, "initial_state must have shape"),
        ({"A": torch.zeros(5)}, "dim, state"),
        ({"u": torch.zeros(2, 5, 0), "delta": torch.zeros(2, 5, 0)}, "empty"),
    ],
)
def test_errors_say_what_is_accepted(change, message):
    inputs = make_inputs(CASES["state_1"], torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change}, delta_softplus=True)


def test_autocast_promotes_the_maps(device):
    half, wide = torch.bfloat16, torch.float32
    u, delta, B, C = (torch.rand(2, 3, 5, device=device) for _ in range(4))
    A = -torch.rand(3, 3, device=device)
    mixed = {"u": u.to(half), "delta": delta, "A": A, "B": B.to(half), "C": C.to(half)}
    with pytest.raises(ValueError, match=r"must share one dtype.*delta torch\.float32"):
        selective_scan(**mixed)
    with torch.autocast(device.type, dtype=half):
        y = selective_scan(**mixed)
    assert y.dtype == wide
    assert torch.equal(y, selective_scan(**{name: m.to(wide) for name, m in mixed.items()}))
