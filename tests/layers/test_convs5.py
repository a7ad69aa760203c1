"""ConvS5 against golden files; whole clips against pieces and single frames."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.layers.convs5 import ConvS5, ConvS5Layer, ConvSSM, discrete, hippo_legs
from vision_ssm.layers.convs5_outputs import HalfGLUOutput, ResNetOutput, StandardOutput
from vision_ssm.layers.over_time import TemporalStack

EXACT = {"rtol": 1e-9, "atol": 1e-11}
ACTIVATIONS = {"gelu": partial(nn.GELU, approximate="tanh"), "relu": nn.ReLU, "swish": nn.SiLU}
NAMES = {
    "half_glu": {"norm": "LayerNorm", "gate": "Dense_0"},
    "resnet": {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"},
    "standard": {
        "norm": "GroupNorm_0",
        "D": "Conv_0",
        "squeeze.fc1": "SEBlock_0.reduce",
        "squeeze.fc2": "SEBlock_0.expand",
    },
}


def load(golden_file, name):
    facts = json.loads(golden_file(f"ops/convs5/{name}.json").read_text())
    return facts, {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/convs5/{name}.npz")).items()}


def pair(arrays, name):
    return torch.stack([arrays[f"{name}_re"], arrays[f"{name}_im"]], dim=-1)


def ssm_weights(arrays, prefix, facts):
    """The weights, or gradients, of a golden recurrence under our names."""
    features, k_in = facts["features"], facts["k_B"]
    return {
        "lambda_re": arrays[f"{prefix}Lambda_re"],
        "lambda_im": arrays[f"{prefix}Lambda_im"],
        "log_step": arrays[f"{prefix}log_step"][:, 0],
        "B": arrays[f"{prefix}B"].unflatten(1, (features, k_in, k_in)),
        "C": arrays[f"{prefix}C"].permute(3, 2, 0, 1, 4),
    }


def linear_weights(arrays, prefix):
    """The weights of a norm, a convolution or a linear map under our names."""
    found = {key.removeprefix(prefix): m for key, m in arrays.items() if key.startswith(prefix)}
    ours = {"bias": found["bias"]} if "bias" in found else {}
    if "scale" in found:
        ours["weight"] = found["scale"]
    else:
        kernel = found["kernel"]
        ours["weight"] = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    return ours


def layer_weights(arrays, prefix, facts):
    found = {f"mixer.ssm.{key}": m for key, m in ssm_weights(arrays, f"{prefix}seq.", facts).items()}
    names = NAMES[facts["output_block"]]
    for ours, theirs in names.items():
        if ours.startswith("squeeze") and not facts.get("squeeze_excite"):
            continue
        theirs = "norm" if theirs == "LayerNorm" else theirs
        for key, m in linear_weights(arrays, f"{prefix}seq.C_D_conv.{theirs}.").items():
            m = m[..., None, None] if ours.startswith("squeeze") and key == "weight" else m
            found[f"mixer.output.{ours}.{key}"] = m
    if f"{prefix}norm.bias" in arrays:
        found |= {f"norm.{key}": m for key, m in linear_weights(arrays, f"{prefix}norm.").items()}
    return found


def build(facts):
    common = {"groups": facts["groups"], "kernel": facts["k_D"], "activation": ACTIVATIONS[facts["activation"]]}
    output = {
        "half_glu": HalfGLUOutput,
        "resnet": partial(ResNetOutput, **common),
        "standard": partial(StandardOutput, **common, squeeze=facts.get("squeeze_excite", False)),
    }[facts["output_block"]]
    mixer = ConvS5(
        facts["features"],
        state=facts["state_real"],
        blocks=facts["blocks"],
        kernels=(facts["k_B"], facts["k_C"]),
        clip_eigenvalues=facts["clip_eigs"],
        output=output,
    )
    return ConvS5Layer(mixer, prenorm=facts["prenorm"]).double()


def frame_by_frame(module, u, state):
    """Outputs of single steps and the last state."""
    found = []
    for frame in u:
        y, state = module.step(frame, state)
        found.append(y)
    return torch.stack(found), state


@pytest.mark.parametrize(("state", "blocks"), [(8, 1), (16, 2), (64, 1), (64, 8)])
def test_initial_spectrum(state, blocks, golden_file):
    """Eigenvectors have a free phase each: their sizes, orthonormality and what they span are compared."""
    _, arrays = load(golden_file, "hippo_init")
    values, vectors = hippo_legs(state, blocks)
    name = f"{state}_{blocks}"
    wanted = torch.complex(arrays[f"V_{name}_re"], arrays[f"V_{name}_im"])
    assert_close(values.real, arrays[f"Lambda_re_{name}"], **EXACT)
    assert_close(values.imag, arrays[f"Lambda_im_{name}"], **EXACT)
    assert_close(vectors.abs(), wanted.abs(), **EXACT)
    assert_close(vectors.mH @ vectors, torch.eye(state // 2, dtype=vectors.dtype), **EXACT)
    assert_close((vectors * values) @ vectors.mH, (wanted * values) @ wanted.mH, **EXACT)


@pytest.mark.parametrize("name", ["T1", "blocks2_k1_clip", "k3", "k5_k3", "zero_state_T17"])
def test_golden_recurrence(name, golden_file):
    facts, arrays = load(golden_file, f"scan_{name}")
    ssm = ConvSSM(
        facts["features"],
        state=facts["state_real"],
        blocks=facts["blocks"],
        kernels=(facts["k_B"], facts["k_C"]),
        clip_eigenvalues=facts["clip_eigs"],
    ).double()
    ssm.load_state_dict(ssm_weights(arrays, "w.", facts), strict=True)
    u, before = arrays["u"].requires_grad_(), pair(arrays, "x0").requires_grad_()
    y, last = ssm(u, before)
    assert_close(y, arrays["y"], **EXACT)
    assert_close(last, pair(arrays, "x_last"), **EXACT)
    torch.autograd.backward((y, last), (arrays["dy"], pair(arrays, "dx_last")))
    assert_close(u.grad, arrays["grad_u"], **EXACT)
    assert_close(before.grad, pair(arrays, "grad_x0"), **EXACT)
    wanted = ssm_weights(arrays, "grad_w.", facts)
    for key, parameter in ssm.named_parameters():
        assert_close(parameter.grad, wanted[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "name", ["half_glu", "resnet_noskip_nonorm", "resnet_postnorm", "standard_prenorm", "standard_se_swish"]
)
def test_golden_layer(name, golden_file):
    facts, arrays = load(golden_file, f"layer_{name}")
    layer = build(facts)
    bare = not facts["skip"] and not facts["use_norm"]
    weights, wanted = (layer_weights(arrays, prefix, facts) for prefix in ("w.", "grad_w."))
    if bare:  # the mixer alone
        layer = layer.mixer
        weights, wanted = ({k.removeprefix("mixer."): m for k, m in found.items()} for found in (weights, wanted))
    layer.load_state_dict(weights, strict=True)
    u, before = arrays["u"].requires_grad_(), pair(arrays, "x0")
    y, last = layer(u, before)
    assert_close(y, arrays["y"], **EXACT)
    assert_close(last, pair(arrays, "x_last"), **EXACT)
    y.backward(arrays["dy"])
    assert_close(u.grad, arrays["grad_u"], **EXACT)
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["resnet_2", "standard_3"])
def test_golden_stack(name, golden_file):
    facts, arrays = load(golden_file, f"stack_{name}")
    stack = TemporalStack([build(facts) for _ in range(facts["layers"])])
    for i, layer in enumerate(stack.layers):
        layer.load_state_dict(layer_weights(arrays, f"w.layers_{i}.", facts), strict=True)
    u = arrays["u"].requires_grad_()
    before = tuple(pair(arrays, f"x0_{i}") for i in range(facts["layers"]))
    y, last = stack(u, before)
    assert_close(y, arrays["y"], **EXACT)
    for i, state in enumerate(last):
        assert_close(state, pair(arrays, f"x_last_{i}"), **EXACT)
    y.backward(arrays["dy"])
    assert_close(u.grad, arrays["grad_u"], **EXACT)
    steps, last_of_steps = frame_by_frame(stack, u, before)
    assert_close(steps, y, **EXACT)
    assert_close(last_of_steps, last, **EXACT)
    x, state = y[-1], last
    for wanted in arrays["y_autoregressive"]:
        x, state = stack.step(x, state)
        assert_close(x, wanted, **EXACT)


def small(layers=2, **options):
    options = {"state": 6, "output": partial(ResNetOutput, groups=2), **options}
    return TemporalStack([ConvS5Layer(ConvS5(4, **options)) for _ in range(layers)])


def test_pieces_and_frames_are_the_whole():
    stack = small().double()
    u = torch.randn(7, 2, 3, 5, 4, dtype=torch.float64)
    y, last = stack(u)
    first, state = stack(u[:3])
    second, state = stack(u[3:], state)
    assert_close(torch.cat([first, second]), y)
    assert_close(state, last)
    steps, state = frame_by_frame(stack, u, None)
    assert_close(steps, y)
    assert_close(state, last)
    assert {tuple(m.shape) for m in last} == {(2, 3, 5, 3, 2)}


def test_a_reset_begins_a_new_clip():
    """Each row holds its clips one after another, as if they were alone; a reset at the first frame drops the state."""
    stack = small().double()
    u = torch.randn(6, 2, 3, 3, 4, dtype=torch.float64)
    before = tuple(torch.randn(2, 3, 3, 3, 2, dtype=torch.float64) for _ in range(2))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2, 0] = reset[5, 0] = reset[0, 1] = True
    y, last = stack(u, before, reset)
    row0 = tuple(m[:1] for m in before)
    alone = [stack(u[:2, :1], row0)[0], stack(u[2:5, :1])[0], stack(u[5:, :1])[0]]
    assert_close(y[:, :1], torch.cat(alone))
    assert_close(y[:, 1:], stack(u[:, 1:])[0])
    assert_close(last[0][:1], stack(u[5:, :1])[1][0])


def test_initial_kernels_are_he_normal_and_the_step_log_uniform():
    ssm = ConvSSM(32, state=64, blocks=2)
    # A unitary map halves the variance of a real kernel's parts when half of its rows are kept: the size stays.
    assert ssm.B.pow(2).sum(-1).mean().item() == pytest.approx(2 / (32 * 9), rel=0.05)
    assert ssm.C.pow(2).sum(-1).mean().item() == pytest.approx(2 / (64 * 9), rel=0.05)
    step = ssm.log_step.exp()
    assert step.min() >= 1e-3 and step.max() <= 0.1 + 1e-7 and step.max() > 10 * step.min()


def test_short_steps_are_discretised_to_full_float32():
    """exp(λΔ) - 1 must not cancel: (Λ̄ - 1) / λ is near Δ where Δ is small."""
    ssm = ConvSSM(1, state=8, kernels=(1, 1))
    exact = ConvSSM(1, state=8, kernels=(1, 1)).double()
    exact.load_state_dict(ssm.state_dict())
    with torch.no_grad():
        for module in (ssm, exact):
            module.log_step.fill_(-9.0)
    assert_close(ssm.discretise()[1].double(), exact.discretise()[1], rtol=2e-6, atol=0)


def test_clipped_eigenvalues_keep_the_state_bounded():
    stack = small(layers=1)
    with torch.no_grad():
        stack.layers[0].mixer.ssm.lambda_re.fill_(0.5)
    assert stack.layers[0].mixer.ssm.discretise()[0].norm(dim=-1).max() < 1
    growing = ConvSSM(4, state=6, clip_eigenvalues=False)
    with torch.no_grad():
        growing.lambda_re.fill_(0.5)
    assert growing.discretise()[0].norm(dim=-1).min() > 1


def test_mixed_precision_is_finite_and_keeps_a_wide_state():
    stack = small()
    u = torch.randn(20, 1, 4, 4, 4)
    exact, _ = stack(u)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = stack(u)
    y.float().sum().backward()
    assert all(state.dtype == torch.float32 for state in last)
    assert all(m.grad.isfinite().all() for m in stack.parameters())
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


def test_bad_input_is_refused():
    stack = small()
    u = torch.randn(2, 1, 3, 3, 4)
    _, state = stack(u)
    with pytest.raises(ValueError, match="clips must be"):
        stack(u[..., :3])
    with pytest.raises(ValueError, match="clips must be"):
        stack(u[0])
    with pytest.raises(ValueError, match="not empty"):
        stack(u[:0])
    with pytest.raises(ValueError, match="2 layers need as many states; got 1"):
        stack(u, state[:1])
    with pytest.raises(ValueError, match="state must have shape"):
        stack(u, tuple(m[:, :2] for m in state))
    with pytest.raises(ValueError, match="state must have shape"):
        stack(u, small(state=8)(u)[1])
    with pytest.raises(ValueError, match="reset must be boolean"):
        stack(u, reset=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="reset must be boolean"):
        stack(u, reset=torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="positive multiple"):
        ConvSSM(4, state=6, blocks=2)
    with pytest.raises(ValueError, match="positive multiple"):
        ConvSSM(4, state=7)
    with pytest.raises(ValueError, match="kernels must be odd"):
        ConvSSM(4, state=6, kernels=(2, 3))


def test_a_discrete_twin_computes_the_same_and_shares_what_it_can():
    stack = TemporalStack(ConvS5Layer(ConvS5(4, state=6, output=partial(ResNetOutput, groups=2))) for _ in range(2))
    twin = discrete(stack)
    u = torch.randn(3, 2, 4, 5, 4)
    y, state = stack(u)
    assert_close(twin(u), (y, state))
    assert_close(twin(u, state), stack(u, state))
    first, first_twin = (m.layers[0] for m in (stack, twin))
    assert isinstance(first.mixer.ssm, ConvSSM) and not isinstance(first_twin.mixer.ssm, ConvSSM)
    assert first.mixer.output is first_twin.mixer.output
    assert not any(m.requires_grad for m in first_twin.mixer.ssm.buffers())
    assert discrete(first.norm) is first.norm
