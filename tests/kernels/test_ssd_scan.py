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
from vision_ssm.kernels.ssd_scan import chunked
from vision_ssm.kernels.ssd_scan.cases import CASES, SMALL, Case, make_inputs
from vision_ssm.kernels.ssd_scan.reference import ssd_scan_ref

EXACT = {"rtol": 1e-9, "atol": 1e-11}


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


@pytest.mark.parametrize(
    ("dtype", "values", "gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 2e-3, 4e-3), (torch.bfloat16, 1e-2, 2e-2)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("name", SMALL)
def test_precision(name, dtype, values, gradients, device):
    inputs = make_inputs(CASES[name], dtype, device)
    exact = run(ssd_scan_ref, {key: m.double() for key, m in inputs.items()}, False)
    for key, have in run(ssd_scan, inputs, False).items():
        error = (have.double() - exact[key]).norm() / exact[key].norm()
        assert error <= (gradients if key.startswith("d") else values), key


@given(
    batch=st.integers(1, 2), length=st.integers(1, 30), groups=st.integers(1, 2), per_group=st.integers(1, 2),
    width=st.integers(1, 3), state=st.integers(1, 3), steps=st.integers(1, 9), reverse=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_chunk(batch, length, groups, per_group, width, state, steps, reverse):
    inputs = make_inputs(Case(batch, length, groups * per_group, width, state, groups), torch.float64, "cpu")
    want = run(ssd_scan_ref, inputs, reverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_STEPS", steps)
        have = run(ssd_scan, inputs, reverse)
    for key in want:
        assert_close(have[key], want[key], **EXACT)


def test_reverse_is_the_scan_of_the_reversed_sequence():
    inputs = make_inputs(CASES["two_chunks"], torch.float64, "cpu")
    flipped = {key: m.flip(1) if key in ("x", "dt", "B", "C") else m for key, m in inputs.items()}
    (y, last), (mirrored, other) = ssd_scan(**inputs, reverse=True), ssd_scan(**flipped)
    assert_close(y, mirrored.flip(1), **EXACT)
    assert_close(last, other, **EXACT)


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["nothing enters", "everything is forgotten"])
def test_extremes_stay_finite(scale):
    inputs = make_inputs(CASES["two_chunks"], torch.float32, "cpu")
    inputs["dt"] = inputs["dt"] * scale
    exact = run(ssd_scan_ref, {key: m.double() for key, m in inputs.items()}, False)
    for key, have in run(ssd_scan, inputs, False).items():
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


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file(name, golden_file):
    facts = json.loads(golden_file(f"ops/ssd/{name}.json").read_text())
    arrays = {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/ssd/{name}.npz")).items()}
    leaves = {
        key: arrays[key].requires_grad_()
        for key in ("x", "dt", "A", "B", "C", "D", "dt_bias", "z", "initial_state")
        if key in arrays
    }
    dt = leaves["dt"] + leaves["dt_bias"] if "dt_bias" in leaves else leaves["dt"]
    dt = F.softplus(dt) if facts["dt_softplus"] else dt
    dt = dt.clamp(*facts["dt_limit"]) if facts["dt_limit"] else dt
    operands = (leaves[key] for key in ("A", "B", "C"))
    y, last = ssd_scan(leaves["x"], dt, *operands, initial_state=leaves.get("initial_state"))
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
