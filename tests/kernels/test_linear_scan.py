"""The linear recurrence over time against its definition and the golden files, values and gradients."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from vision_ssm.kernels import linear_scan, linear_step
from vision_ssm.kernels.linear_scan import cpu, gpu
from vision_ssm.kernels.linear_scan.cases import CASES, SMALL, Case, make_inputs
from vision_ssm.kernels.linear_scan.reference import linear_scan_ref

EXACT = {"rtol": 1e-9, "atol": 1e-11}
PRECISION = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (5e-3, 1e-2)}
"""Largest error of values and of gradients, relative to the norm of each."""


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, initial_state, resets, pairs):
        h, last = gpu.forward(a, b, initial_state, resets, pairs)
        ctx.save_for_backward(a, h, initial_state, resets)
        ctx.pairs = pairs
        return h, last

    @staticmethod
    def backward(ctx, dh, dlast):
        a, h, initial_state, resets = ctx.saved_tensors
        da, db, dinitial = gpu.backward(dh, dlast, a, h, initial_state, resets, ctx.pairs)
        assert (da.dtype, da.shape, db.dtype) == (a.dtype, a.shape, h.dtype)
        return da, db, None if initial_state is None else dinitial, None, None


def on_triton(a, b, *, initial_state=None, resets=None, pairs=False):
    """``linear_scan`` by the Triton kernels, in the interpreter where there is no GPU."""
    return _OnTriton.apply(a, b, initial_state, resets, pairs)


def run(function, inputs, **options):
    """Outputs and all gradients by name; random cotangents for both outputs."""
    leaves = {key: m.detach().requires_grad_() for key, m in inputs.items()}
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(m.shape, generator=generator).bfloat16().to(m) for m in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"h": outputs[0], "last": outputs[1], **dict(zip((f"d{key}" for key in leaves), grads, strict=True))}


def some_resets(case, device="cpu"):
    """About one step in five, and the very first of the last sample."""
    resets = torch.rand(case.length, case.batch, generator=torch.Generator().manual_seed(2)) < 0.2
    resets[0, -1] = True
    return resets.to(device)


def assert_equal(have, want):
    for key in want:
        assert_close(have[key], want[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def assert_precise(function, inputs, **options):
    values, gradients = PRECISION[inputs["b"].dtype]
    exact = run(linear_scan_ref, {key: m.double() for key, m in inputs.items()}, **options)
    for key, have in run(function, inputs, **options).items():
        error = (have.double() - exact[key]).norm() / exact[key].norm()
        assert error <= (gradients if key.startswith("d") else values), key


@pytest.fixture(params=["chunks", "one chunk"])
def chunking(request, monkeypatch):
    monkeypatch.setattr(cpu, "_WIDE", 1 << 30 if request.param == "chunks" else 1)


@pytest.mark.parametrize("with_resets", [False, True], ids=["whole", "resets"])
@pytest.mark.parametrize("name", SMALL)
def test_equals_reference_in_float64(name, with_resets, chunking, device):
    case = CASES[name]
    inputs = make_inputs(case, torch.float64, device)
    options = {"pairs": case.pairs, "resets": some_resets(case, device) if with_resets else None}
    assert_equal(run(linear_scan, inputs, **options), run(linear_scan_ref, inputs, **options))


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_precision(name, dtype, device):
    case = CASES[name]
    inputs = make_inputs(case, dtype, device)
    assert_precise(linear_scan, inputs, pairs=case.pairs, resets=some_resets(case, device))


@pytest.fixture(params=[1, 12], ids=["one run", "several runs"])
def small_blocks(request, monkeypatch):
    """Blocks of 8 numbers, so that few channels have several, and as many programs wanted as cut time or do not."""
    monkeypatch.setattr(gpu, "block_size", lambda dtype, pairs: 8)
    monkeypatch.setattr(gpu, "_PROGRAMS", request.param)
    return request.param


TINY = {
    "1 step": Case(1, 2, (3,), (3,), pairs=True),
    "by channel": Case(7, 2, (2, 3), (3,), pairs=True),
    "by element, real": Case(5, 1, (9,), (9,)),
    "by sample": Case(6, 2, (2, 2), (2, 1, 1)),
    "blocks of one sample": Case(6, 2, (4, 2), (2,), pairs=True),
    "varying": Case(5, 2, (5,), (5, 2, 5), pairs=True),
    "varying by channel": Case(4, 2, (2, 3), (4, 1, 1, 3)),
    "three runs of axes": Case(3, 2, (2, 2, 2), (3, 2, 1, 2, 1), pairs=True),
    "three runs of axes, the same at every step": Case(3, 2, (2, 2, 2), (2, 1, 2, 1)),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_triton_equals_reference(case, small_blocks, device):
    """Resets in several runs, some of which have none; without them in one."""
    inputs = make_inputs(case, torch.float64, device)
    options = {"pairs": case.pairs, "resets": some_resets(case, device) if small_blocks > 1 else None}
    assert_equal(run(on_triton, inputs, **options), run(linear_scan_ref, inputs, **options))


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("pairs", [False, True], ids=["real", "pairs"])
def test_triton_with_its_own_blocks(pairs, dtype, device):
    case = Case(9, 2, (3, 5), (5,), pairs)
    assert_precise(on_triton, make_inputs(case, dtype, device), pairs=pairs)


def test_kernels_compile_to_wide_accesses_and_loops_without_barriers():
    """For sm_90, which need not be there: 16 bytes a thread; in ConvS5 no thread waits for another between steps."""
    program = Path(__file__).with_name("record_linear_launches.py")
    done = subprocess.run([sys.executable, program, "90"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    convs5 = {row["kernel"]: row["loops"] for row in rows if row["case"] == "state of ConvS5"}
    assert convs5 == {"scan_kernel": [0], "gradient_kernel": [0]}
    assert len(rows) == 8
    for row in rows:
        assert row["stores"]
        assert all(".v4." in store for store in row["stores"]), row


def test_triton_without_an_initial_state(device):
    inputs = make_inputs(TINY["varying"], torch.float64, device)
    del inputs["initial_state"]
    assert_equal(run(on_triton, inputs, pairs=True), run(linear_scan_ref, inputs, pairs=True))


@pytest.mark.parametrize("function", [linear_scan, on_triton], ids=["operator", "triton"])
def test_two_runs_are_equal(function, small_blocks, device):
    inputs = make_inputs(TINY["by channel"], torch.float32, device)
    first, second = run(function, inputs, pairs=True), run(function, inputs, pairs=True)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("function", [linear_scan, on_triton], ids=["operator", "triton"])
def test_clips_that_share_a_row_stay_apart(function, small_blocks, device):
    """Each gives the bits that it gives alone, whatever is beside it: NaN too."""
    case = Case(7, 2, (3,), (3,), pairs=True)
    inputs = make_inputs(case, torch.float64, device)
    resets = torch.zeros(7, 2, dtype=torch.bool, device=device)
    resets[4] = True
    alone = {"a": inputs["a"], "b": inputs["b"][4:]}
    poisoned = {**inputs, "b": inputs["b"].clone()}
    poisoned["b"][:4] = float("nan")
    want, have = run(linear_scan_ref, alone, pairs=True), run(function, poisoned, pairs=True, resets=resets)
    assert_close(have["h"][4:], want["h"], **EXACT)
    assert_close(have["last"], want["last"], **EXACT)
    leaf = inputs["b"].clone().requires_grad_()
    h, _ = function(inputs["a"], leaf, pairs=True, resets=resets)
    assert torch.autograd.grad(h[4:].sum(), leaf)[0][:4].abs().max() == 0


@given(
    length=st.integers(1, 40), batch=st.integers(1, 3), trailing=st.lists(st.integers(1, 3), max_size=3),
    has=st.lists(st.booleans(), min_size=5, max_size=5), pairs=st.booleans(), resets=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_broadcast(length, batch, trailing, has, pairs, resets):
    full = (length, batch, *trailing)
    decay = tuple(size if one else 1 for size, one in zip(full, has, strict=False))
    case = Case(length, batch, tuple(trailing), decay, pairs)
    inputs = make_inputs(case, torch.float64, "cpu")
    options = {"pairs": pairs, "resets": some_resets(case) if resets else None}
    assert_equal(run(linear_scan, inputs, **options), run(linear_scan_ref, inputs, **options))


@given(step=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=6))
def test_layout_finds_every_decay(step):
    """Where the kernels read a number's decay is where broadcasting puts it."""
    shape = tuple(size for size, _ in step)
    decay = tuple(size if has else 1 for size, has in step)
    layout = gpu.find_layout(decay, shape)
    if layout is None:
        present = [has for size, has in step if size > 1]
        assert sum(one and not before for before, one in zip([False, *present], present, strict=False)) > 1
        return
    place = torch.arange(int(np.prod(shape)))
    index = place // layout.span % layout.rows * layout.channels + place % layout.channels
    values = torch.arange(int(np.prod(decay))).view(decay)
    assert torch.equal(values.flatten()[index], values.expand(shape).flatten())


@pytest.mark.parametrize("pairs", [False, True], ids=["real", "pairs"])
def test_gradcheck(pairs):
    case = Case(5, 2, (2,), (5, 1, 2), pairs)
    leaves = [m.requires_grad_() for m in make_inputs(case, torch.float64, "cpu").values()]
    resets = some_resets(case)
    torch.autograd.gradcheck(lambda a, b, s: linear_scan(a, b, initial_state=s, resets=resets, pairs=pairs), leaves)


@pytest.mark.parametrize("function", [linear_scan, on_triton], ids=["operator", "triton"])
def test_strided_inputs(function, device):
    case = TINY["by channel"]
    inputs = make_inputs(case, torch.float64, device)
    strided = {name: m.transpose(0, -1).contiguous().transpose(0, -1) for name, m in inputs.items()}
    strided["b"] = inputs["b"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided["b"].is_contiguous()
    resets = some_resets(case, device).T.contiguous().T
    assert_equal(run(function, strided, pairs=True, resets=resets), run(function, inputs, pairs=True, resets=resets))


def test_state_carries_over():
    inputs = make_inputs(CASES["by_channel"], torch.float64, "cpu")
    h, last = linear_scan(**inputs, pairs=True)
    first, state = linear_scan(inputs["a"], inputs["b"][:5], initial_state=inputs["initial_state"], pairs=True)
    second, end = linear_scan(inputs["a"], inputs["b"][5:], initial_state=state, pairs=True)
    assert_close(torch.cat([first, second]), h, **EXACT)
    assert_close(end, last, **EXACT)


def test_steps_are_the_scan():
    case = CASES["by_channel"]
    inputs, resets = make_inputs(case, torch.float64, "cpu"), some_resets(case)
    h, last = linear_scan(**inputs, resets=resets, pairs=True)
    state = inputs["initial_state"].requires_grad_()
    start = state
    for b, reset, want in zip(inputs["b"], resets, h, strict=True):
        state = linear_step(inputs["a"], b, state, reset=reset, pairs=True)
        assert_close(state, want, **EXACT)
    assert_close(state, last, **EXACT)
    grads = (
        torch.autograd.grad(m.sum(), start)[0] for m in (state, linear_scan(**inputs, resets=resets, pairs=True)[1])
    )
    assert_close(*grads, **EXACT)


def test_mixed_precision_keeps_the_state_wide(device):
    inputs = make_inputs(CASES["by_channel"], torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        h, last = linear_scan(**inputs, pairs=True)
        step = linear_step(inputs["a"], inputs["b"][0], inputs["initial_state"], pairs=True)
    assert (h.dtype, last.dtype, step.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(last.bfloat16(), h[-1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything, device):
    case = TINY["by channel"]
    a, b, state = (m.requires_grad_() for m in make_inputs(case, torch.float32, device).values())
    rest = (state, some_resets(case, device), True) if everything else (None, None, False)
    torch.library.opcheck(torch.ops.vision_ssm.linear_scan.default, (a, b, *rest))


def test_compiles_for_every_length():
    """One program without a graph break, forward and backward."""
    counter = CompileCounterWithBackend("aot_eager")

    def squares(**inputs):
        h, last = linear_scan(**inputs, pairs=True)
        return h.square(), last

    compiled = torch.compile(squares, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 9):
        inputs = make_inputs(Case(length, 2, (3, 4), (4,), pairs=True), torch.float64, "cpu")
        assert_equal(run(compiled, inputs), run(squares, inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "function"),
    [
        *((f"scan_{name}", linear_scan) for name in ("T1", "blocks2_k1_clip", "k3", "k5_k3", "zero_state_T17")),
        ("scan_blocks2_k1_clip", on_triton),
    ],
)
def test_golden_convs5(name, function, golden_file, device):
    """The published layer's state, between convolutions of PyTorch."""
    facts = json.loads(golden_file(f"ops/convs5/{name}.json").read_text())
    m = {key: torch.from_numpy(v).to(device) for key, v in np.load(golden_file(f"ops/convs5/{name}.npz")).items()}
    names = ["u", *(f"x0_{part}" for part in ("re", "im") if f"x0_{part}" in m), *(k for k in m if k.startswith("w."))]
    leaves = {key: m[key].requires_grad_() for key in names}
    rate = leaves["w.Lambda_re"]
    rate = torch.complex(rate.clamp(max=-1e-4) if facts["clip_eigs"] else rate, leaves["w.Lambda_im"])
    decay = torch.exp(rate * leaves["w.log_step"].exp().flatten())
    enter = torch.view_as_complex(leaves["w.B"]) * ((decay - 1) / rate)[:, None]
    enter = enter.unflatten(1, (facts["features"], facts["k_B"], facts["k_B"]))
    leave = torch.view_as_complex(leaves["w.C"]).permute(3, 2, 0, 1)

    def convolve(maps, kernel):
        out = F.conv2d(maps.flatten(0, 1).permute(0, 3, 1, 2).to(kernel.dtype), kernel, padding=kernel.shape[-1] // 2)
        return out.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2])

    state = torch.stack([leaves["x0_re"], leaves["x0_im"]], -1) if "x0_re" in leaves else None
    driven = torch.view_as_real(convolve(leaves["u"], enter))
    h, last = function(torch.view_as_real(decay), driven, initial_state=state, pairs=True)
    y = 2 * convolve(torch.view_as_complex(h), leave).real
    assert_close(y, m["y"], **EXACT)
    assert_close(last[..., 0], m["x_last_re"], **EXACT)
    assert_close(last[..., 1], m["x_last_im"], **EXACT)
    loss = (y * m["dy"]).sum() + (last[..., 0] * m["dx_last_re"] + last[..., 1] * m["dx_last_im"]).sum()
    for key, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert_close(grad, m[f"grad_{key}"], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(4)}, r"b must have shape \(time, batch, ...\); got \(4,\)"),
        ({"b": torch.zeros(4, 2, 3, dtype=torch.int64)}, "b must be real floating point"),
        ({"b": torch.zeros(4, 2, 3, dtype=torch.complex64)}, "give torch.view_as_real of all complex tensors"),
        ({"b": torch.zeros(0, 2, 3)}, "b is empty"),
        ({"a": torch.zeros(2)}, r"a must broadcast against b of shape \(4, 2, 3\).*got \(2,\)"),
        ({"a": torch.zeros(5, 2, 3)}, "a must broadcast"),
        ({"a": torch.zeros(1, 4, 2, 3)}, "a must broadcast"),
        ({"a": torch.zeros(3, device="meta")}, "on one device"),
        ({"initial_state": torch.zeros(3)}, r"one step of b, \(2, 3\); got \(3,\)"),
        ({"resets": torch.zeros(4, 2)}, "resets must be bool; got torch.float32"),
        ({"resets": torch.zeros(2, 4, dtype=torch.bool)}, r"resets must have shape \(time=4, batch=2\)"),
        ({"resets": torch.zeros(4, 2, dtype=torch.bool, device="meta")}, "on one device"),
        ({"pairs": True}, r"with pairs, the last axis of a must be 2; got \(3,\)"),
        ({"pairs": True, "a": torch.zeros(2)}, r"with pairs, the last axis of b must be 2; got \(4, 2, 3\)"),
        ({"pairs": True, "a": torch.zeros(2), "b": torch.zeros(4, 2)}, r"b must have shape \(time, batch, ..., 2\)"),
    ],
    ids=str,
)
def test_bad_input_says_what_is_accepted(change, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**{"a": torch.zeros(3), "b": torch.zeros(4, 2, 3), **change})
