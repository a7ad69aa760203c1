"""The scalar-decay scan against its recurrence and the golden files, values and gradients."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels import ssd_scan
from vision_ssm.kernels.ssd_scan import chunked, gpu
from vision_ssm.kernels.ssd_scan.cases import CASES, SMALL, Case, make_inputs
from vision_ssm.kernels.ssd_scan.reference import ssd_scan_ref

EXACT = {"rtol": 1e-9, "atol": 1e-11}
PRECISION = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}
"""Largest error of values and of gradients, relative to the norm of each."""


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.reverse = reverse
        return gpu.forward(*inputs, reverse)

    @staticmethod
    def backward(ctx, dy, dlast):
        inputs = ctx.saved_tensors
        grads = gpu.backward(dy, dlast, *inputs, ctx.reverse)
        assert [grad.dtype for grad, m in zip(grads, inputs, strict=True) if m is not None] == [
            m.dtype for m in inputs if m is not None
        ]
        return None, *(None if m is None else grad for grad, m in zip(grads, inputs, strict=True))


def on_triton(x, dt, A, B, C, initial_state=None, reverse=False):
    """``ssd_scan`` by the Triton kernels, in the interpreter where there is no GPU."""
    return _OnTriton.apply(reverse, x, dt, A, B, C, initial_state)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that short sequences have several chunks and narrow heads several blocks."""
    tiles = {"BLOCK_L": 16, "BLOCK_P": 16, "BLOCK_N": 16, "num_warps": 4}
    monkeypatch.setattr(gpu, "block_sizes", lambda *sizes: tiles)


def run(function, inputs, reverse):
    """Outputs and all gradients by name; random cotangents for both outputs."""
    leaves = {key: m.detach().requires_grad_() for key, m in inputs.items()}
    outputs = function(**leaves, reverse=reverse)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m) for m in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"y": outputs[0], "last": outputs[1], **dict(zip((f"d{key}" for key in leaves), grads, strict=True))}


@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
@pytest.mark.parametrize("name", SMALL)
def test_equals_reference_in_float64(name, reverse, device):
    inputs = make_inputs(CASES[name], torch.float64, device)
    want = run(ssd_scan_ref, inputs, reverse)
    for key, have in run(ssd_scan, inputs, reverse).items():
        assert_close(have, want[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def assert_precise(function, inputs, reverse):
    values, gradients = PRECISION[inputs["x"].dtype]
    exact = run(ssd_scan_ref, {key: m.double() for key, m in inputs.items()}, reverse)
    for key, have in run(function, inputs, reverse).items():
        error = (have.double() - exact[key]).norm() / exact[key].norm()
        assert error <= (gradients if key.startswith("d") else values), key


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_precision(name, dtype, device):
    assert_precise(ssd_scan, make_inputs(CASES[name], dtype, device), False)


RAGGED = {
    "1 step": (Case(1, 1, 1, 3, 1), 1),
    "2 steps, 48 x 64": (Case(1, 2, 1, 48, 64), 1),
    "a chunk less 1": (Case(2, 15, 2, 5, 7, groups=2), 1),
    "a chunk": (Case(1, 16, 2, 16, 16), 1),
    "a chunk and 1": (Case(1, 17, 2, 24, 2), 1),
    "3 runs of a chunk": (Case(1, 37, 2, 17, 20), 99),
    "2 runs of 2 chunks": (Case(1, 61, 2, 3, 5), 4),
}
"""Cases for tiles of 16, and the programs that are wanted, on which the number of runs depends."""


@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
@pytest.mark.parametrize(("case", "programs"), RAGGED.values(), ids=RAGGED)
def test_triton_equals_reference(case, programs, reverse, small_tiles, device, monkeypatch):
    monkeypatch.setattr(gpu, "_PROGRAMS", programs)
    assert_precise(on_triton, make_inputs(case, torch.float32, device), reverse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_triton_with_its_own_tiles(dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 matrices as integers")
    inputs = make_inputs(Case(1, 67, 1, 20, 18), dtype, device)
    if dtype == torch.float64:
        want = run(ssd_scan_ref, inputs, True)
        for key, have in run(on_triton, inputs, True).items():
            assert_close(have, want[key], **EXACT, msg=lambda text: f"{key}: {text}")  # noqa: B023  used at once
    else:
        assert_precise(on_triton, inputs, True)


def test_triton_in_mixed_precision(device):
    inputs = make_inputs(Case(1, 9, 2, 4, 3), torch.float16, device)
    inputs["A"] = inputs["A"].double()
    inputs["initial_state"] = inputs["initial_state"].half()
    assert run(on_triton, inputs, False)["last"].dtype == torch.float64
    assert_precise(on_triton, inputs, False)


@pytest.mark.parametrize("programs", [1, 99], ids=["one run", "many"])
def test_triton_two_runs_are_equal(programs, small_tiles, device, monkeypatch):
    monkeypatch.setattr(gpu, "_PROGRAMS", programs)
    inputs = make_inputs(Case(1, 20, 2, 20, 4), torch.float32, device)
    first, second = run(on_triton, inputs, False), run(on_triton, inputs, False)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("function", [ssd_scan, on_triton], ids=["operator", "triton"])
def test_short_steps_beside_a_long_one(function, device):
    """The decay between two of them is a difference that a sum over the long one would round away."""
    inputs = make_inputs(Case(1, 12, 1, 2, 2), torch.float32, device)
    inputs["dt"] = torch.full_like(inputs["dt"], 1e-3)
    inputs["dt"][:, 1] = 1e6
    inputs["A"] = -torch.ones_like(inputs["A"])
    inputs = {key: m.abs() if key in ("x", "B", "C") else m for key, m in inputs.items()}  # nothing cancels
    y, last = function(**inputs)
    want_y, want_last = ssd_scan_ref(**{key: m.double() for key, m in inputs.items()})
    assert_close(y.double(), want_y, rtol=2e-6, atol=0)
    assert_close(last.double(), want_last, rtol=2e-6, atol=0)


@given(
    batch=st.integers(1, 2), length=st.integers(1, 30), groups=st.integers(1, 2), per_group=st.integers(1, 2),
    width=st.integers(1, 3), state=st.integers(1, 3), steps=st.integers(1, 9), reverse=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_chunk(batch, length, groups, per_group, width, state, steps, reverse):
    inputs = make_inputs(Case(batch, length, groups * per_group, width, state, groups), torch.float64, "cpu")
    want = run(ssd_scan_ref, inputs, reverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "STEPS", steps)
        have = run(ssd_scan, inputs, reverse)
    for key in want:
        assert_close(have[key], want[key], **EXACT)


def test_reverse_is_the_scan_of_the_reversed_sequence():
    inputs = make_inputs(CASES["two_chunks"], torch.float64, "cpu")
    flipped = {key: m.flip(1) if key in ("x", "dt", "B", "C") else m for key, m in inputs.items()}
    (y, last), (mirrored, other) = ssd_scan(**inputs, reverse=True), ssd_scan(**flipped)
    assert_close(y, mirrored.flip(1), **EXACT)
    assert_close(last, other, **EXACT)


@pytest.mark.parametrize("function", [ssd_scan, on_triton], ids=["operator", "triton"])
@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["nothing enters", "everything is forgotten"])
def test_extremes_stay_finite(scale, function, device):
    inputs = make_inputs(CASES["two_chunks"], torch.float32, device)
    inputs["dt"] = inputs["dt"] * scale
    exact = run(ssd_scan_ref, {key: m.double() for key, m in inputs.items()}, False)
    for key, have in run(function, inputs, False).items():
        assert have.isfinite().all(), key
        assert_close(have.double(), exact[key], rtol=1e-4, atol=1e-4 * max(1.0, exact[key].abs().max().item()))


def test_gradcheck():
    inputs = make_inputs(Case(1, 7, 2, 2, 2), torch.float64, "cpu")
    leaves = [m.requires_grad_() for m in inputs.values()]
    for reverse in (False, True):
        torch.autograd.gradcheck(
            lambda *m, reverse=reverse: ssd_scan(*m[:-1], initial_state=m[-1], reverse=reverse), leaves
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck(with_state, device):
    inputs = make_inputs(CASES["groups"], torch.float32, device)
    state = inputs.pop("initial_state")
    tensors = [m.detach().requires_grad_() for m in (*inputs.values(), *([state] if with_state else []))]
    arguments = (*tensors[:5], tensors[5] if with_state else None, False)
    torch.library.opcheck(torch.ops.vision_ssm.ssd_scan.default, arguments)


GOLDEN = [
    "base_initial_state",
    "dt_limit",
    "gated_D_per_channel",
    "groups2_length_prime",
    "large_dt",
    "length1",
    "no_bias_no_softplus",
    "state32_len64",
]


@pytest.mark.parametrize("function", [ssd_scan, on_triton], ids=["operator", "triton"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file(name, function, golden_file, device):
    facts = json.loads(golden_file(f"ops/ssd/{name}.json").read_text())
    arrays = {key: torch.from_numpy(m).to(device) for key, m in np.load(golden_file(f"ops/ssd/{name}.npz")).items()}
    leaves = {
        key: arrays[key].requires_grad_()
        for key in ("x", "dt", "A", "B", "C", "D", "dt_bias", "z", "initial_state")
        if key in arrays
    }
    dt = leaves["dt"] + leaves["dt_bias"] if "dt_bias" in leaves else leaves["dt"]
    dt = F.softplus(dt) if facts["dt_softplus"] else dt
    dt = dt.clamp(*facts["dt_limit"]) if facts["dt_limit"] else dt
    operands = (leaves[key] for key in ("A", "B", "C"))
    y, last = function(leaves["x"], dt, *operands, initial_state=leaves.get("initial_state"))
    if "D" in leaves:
        y = y + (leaves["D"] if leaves["D"].dim() == 2 else leaves["D"][:, None]) * leaves["x"]
    if "z" in leaves:
        y = y * F.silu(leaves["z"])
    assert_close(y, arrays["y"], **EXACT)
    assert_close(last, arrays["final_state"], **EXACT)
    losses = {"grad_": (y * arrays["dy"]).sum()}
    if "dfinal_state" in arrays:
        losses["grad2_"] = losses["grad_"] + (last * arrays["dfinal_state"]).sum()
    for prefix, loss in losses.items():
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        for key, grad in zip(leaves, grads, strict=True):
            assert_close(grad, arrays[f"{prefix}{key}"], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 17, 4)}, "x must have shape"),
        ({"dt": torch.zeros(2, 16, 4)}, "dt must have shape"),
        ({"A": torch.zeros(3)}, "A must have shape"),
        ({"B": torch.zeros(2, 17, 3, 3)}, "groups dividing heads=4"),
        ({"C": torch.zeros(2, 17, 2, 4)}, "C must have shape"),
        ({"C": torch.zeros(2, 17, 2, 3, dtype=torch.float64)}, "share one dtype"),
        ({"initial_state": torch.zeros(2, 4, 2, 4)}, "initial_state must have shape"),
        ({"x": torch.zeros(2, 17, 4, 2, dtype=torch.int64)}, "floating point"),
        ({"x": torch.zeros(2, 0, 4, 2)}, "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_says_what_is_accepted(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**make_inputs(CASES["groups"], torch.float32, "cpu"), **change})
