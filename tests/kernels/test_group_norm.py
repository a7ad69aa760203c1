"""Group norm with an activation against its definition and PyTorch's, values and gradients."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels.group_norm import gpu
from vision_ssm.kernels.group_norm.op import ACTIVATIONS, group_norm_act
from vision_ssm.kernels.group_norm.reference import group_norm_act_ref

EXACT = {"rtol": 1e-9, "atol": 1e-11}
EPS = 1e-6


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, activation):
        y, mean, rstd = gpu.forward(x, groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dweight, dbias = gpu.backward(dy, *ctx.saved_tensors, ctx.activation)
        return dx, None, dweight, dbias, None, None


def on_triton(x, groups, weight, bias, *, eps, activation):
    """``group_norm_act`` by the Triton kernels, in the interpreter where there is no GPU."""
    return _OnTriton.apply(x, groups, weight, bias, eps, activation)


def by_operator(x, groups, weight, bias, *, eps, activation):
    return torch.ops.vision_ssm.group_norm_act(x, groups, weight, bias, eps, activation)[0]


def make_inputs(shape, dtype=torch.float64, device="cpu", layout=torch.channels_last):
    """Maps whose mean is large beside their deviation, as float32 could not square and subtract it."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 50
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(device, dtype).contiguous(memory_format=layout), weight.to(device, wide), bias.to(device, wide)


def run(function, inputs, groups, activation):
    x, weight, bias = (m.detach().requires_grad_() for m in inputs)
    y = function(x, groups, weight, bias, eps=EPS, activation=activation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y, *torch.autograd.grad(y, (x, weight, bias), dy)), strict=True))


def assert_equal(have, want):
    for key in want:
        assert_close(have[key], want[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def reference(x, groups, weight, bias, *, eps, activation):
    return group_norm_act_ref(x, groups, weight, bias, eps, activation)


FUNCTIONS = {"function": group_norm_act, "operator": by_operator, "triton": on_triton}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_reference_in_float64(function, activation, layout, device):
    inputs = make_inputs((2, 12, 5, 7), device=device, layout=layout)
    assert_equal(run(function, inputs, 4, activation), run(reference, inputs, 4, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_in_several_runs_of_several_tiles(activation, device, monkeypatch):
    """Runs of two tiles of four rows; the last has a tile and a half less."""
    monkeypatch.setattr(gpu, "_TILE", 16)
    monkeypatch.setattr(gpu, "_CHANNELS", 4)
    monkeypatch.setattr(gpu, "_TILES", 2)
    monkeypatch.setattr(gpu, "_PROGRAMS", 1)
    inputs = make_inputs((2, 8, 6, 3), device=device)
    assert gpu._Call(inputs[0], 4, torch.float64, activation).sizes[-2:] == (3, 2)
    assert_equal(run(on_triton, inputs, 4, activation), run(reference, inputs, 4, activation))


@settings(max_examples=12)
@given(
    maps=st.integers(1, 3), groups=st.integers(1, 5), size=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), tile=st.sampled_from([16, 4096]),
)  # fmt: skip
def test_any_shape(maps, groups, size, grid, tile):
    """A group of a single number has no deviation: what is left is the bias."""
    inputs = make_inputs((maps, groups * size, *grid))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_TILE", tile)
        patch.setattr(gpu, "_PROGRAMS", 4)
        have, want = (run(function, inputs, groups, "elu") for function in (on_triton, reference))
    for key in want:
        assert_close(have[key], want[key], rtol=1e-8, atol=1e-8 if size * grid[0] * grid[1] > 1 else 1e-3)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", [by_operator, on_triton], ids=["operator", "triton"])
def test_precision(function, activation, dtype, largest, device):
    """Half precision is that of inputs and outputs alone: weights, sums and activations are wider."""
    inputs = make_inputs((2, 8, 6, 5), dtype, device)
    exact = run(reference, [m.double() for m in inputs], 2, activation)
    for key, have in run(function, inputs, 2, activation).items():
        assert have.dtype == (dtype if key in ("y", "dx") else torch.float32)
        assert (have.double() - exact[key]).norm() <= largest * exact[key].norm(), key


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_numbers_stay_finite(activation):
    """Of both signs, far out on the tails of the activations."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, :, 0, 0] = torch.tensor([1e15, -1e15])
    weight, bias = torch.full((2,), 100.0), torch.zeros(2)
    have, want = (run(function, (x, weight, bias), 1, activation) for function in (on_triton, reference))
    assert all(m.isfinite().all() for m in have.values())
    assert_close(have["y"], want["y"], rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal(device):
    inputs = make_inputs((3, 12, 9, 5), torch.float32, device)
    first, second = (run(on_triton, inputs, 4, "gelu_tanh") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_keeps_the_contract_of_operators(layout, device):
    x, weight, bias = (m.detach().requires_grad_() for m in make_inputs((2, 6, 3, 4), torch.float32, device, layout))
    torch.library.opcheck(torch.ops.vision_ssm.group_norm_act.default, (x, 2, weight, bias, EPS, "elu"))


def test_one_convolution_takes_what_another_gives(device):
    """Maps keep their layout both ways, so that none is copied."""
    x, weight, bias = make_inputs((2, 6, 3, 4), torch.float32, device)
    y, mean, rstd = torch.ops.vision_ssm.group_norm_act(x, 2, weight, bias, EPS, "elu")
    dx, _, _ = torch.ops.vision_ssm.group_norm_act_backward(y, x, weight, bias, mean, rstd, "elu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 6, 3)}, "x must be"),
        ({"groups": 4}, "a multiple of 4"),
        ({"weight": torch.zeros(5)}, "weight must have shape"),
        ({"activation": "relu"}, "gelu_tanh, elu"),
        ({"x": torch.zeros(0, 6, 3, 3)}, "x is empty"),
    ],
)
def test_what_does_not_fit_is_an_error(change, said):
    given = {"x": torch.zeros(2, 6, 3, 3), "groups": 2, "weight": torch.zeros(6), "bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=said):
        group_norm_act(**{**given, "eps": EPS, "activation": "elu", **change})


def test_kernels_compile_to_wide_accesses():
    """For sm_90, which need not be there: in half precision maps are read and written 16 bytes a thread."""
    program = Path(__file__).with_name("record_norm_launches.py")
    done = subprocess.run([sys.executable, program, "90"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kernel"] for row in rows[:4]] == ["moments_kernel", "output_kernel", "sums_kernel", "gradient_kernel"]
    assert len(rows) == 12
    for row in rows:
        if row["case"] != "ragged":
            assert row["widest"] == "v4", row
