"""The quasiseparable mixer against golden layers and against its mixing matrix."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vision_ssm.layers import Hydra
from vision_ssm.layers.hydra import COMBINATIONS

EXACT = {"rtol": 1e-9, "atol": 1e-11}
NAMES = (("conv1d.", "conv."), ("fc_D.", "diagonal."), ("init_states", "initial_state"))


def ours(arrays, prefix):
    """Arrays of a golden file under our names."""
    found = {key.removeprefix(prefix): m for key, m in arrays.items() if key.startswith(prefix)}
    for theirs, our in NAMES:
        found = {key.replace(theirs, our): m for key, m in found.items()}
    return found


def golden(golden_file, name):
    facts = json.loads(golden_file(f"ops/hydra/{name}.json").read_text())
    arrays = {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/hydra/{name}.npz")).items()}
    layer = Hydra(
        facts["d_model"],
        state=facts["state"],
        expand=facts["d_inner"] / facts["d_model"],
        head_dim=facts["head_dim"],
        groups=facts["groups"],
        taps=facts["d_conv"],
        bias=facts["bias"],
        learned_state=facts["learnable_init_states"],
    ).double()
    layer.load_state_dict(ours(arrays, "w."), strict=True)
    return layer, arrays


@pytest.mark.parametrize("name", ["base", "groups2", "init_states_bias", "length1", "length17", "length2_conv3"])
def test_golden_layer(name, golden_file):
    layer, arrays = golden(golden_file, name)
    x = arrays["x"].requires_grad_()
    y = layer(x)
    assert_close(y, arrays["y"], **EXACT)
    y.backward(arrays["dy"])
    assert_close(x.grad, arrays["grad_x"], **EXACT)
    wanted = ours(arrays, "grad_w.")
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def matrices(arrays):
    """Mixing matrices (b, h, l, l) of the two scans, token included, from their definition; and the diagonal."""
    dt, A = (arrays["core_dt_fwd"], arrays["core_dt_bwd"]), arrays["core_A"]
    heads, length = A.shape[0], dt[0].shape[1]
    found = []
    for side, step in zip(("fwd", "bwd"), dt, strict=True):
        B, C = (arrays[f"core_{m}_{side}"].repeat_interleave(heads // arrays["core_B_fwd"].shape[2], 2) for m in "BC")
        matrix = torch.zeros(dt[0].shape[0], heads, length, length, dtype=torch.float64)
        for i in range(length):
            for j in range(length):
                passed = range(j + 1, i + 1) if side == "fwd" else range(i, j)
                if (j > i) == (side == "fwd") and i != j:
                    continue
                decay = torch.exp(sum((step[:, k] * A for k in passed), torch.zeros_like(step[:, 0])))
                matrix[:, :, i, j] = (C[:, i] * B[:, j]).sum(-1) * decay * step[:, j]
        found.append(matrix)
    return *found, torch.diag_embed(arrays["core_diag"].transpose(1, 2))


@pytest.mark.parametrize("name", ["base", "groups2"])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_mixing_matrix(name, combine, golden_file):
    """Each combination is what its matrices say; Hydra's is the golden one."""
    layer, arrays = golden(golden_file, name)
    layer.combine = COMBINATIONS[combine]
    _, convolved, dt = layer.in_proj(arrays["x"]).split(layer.widths, dim=-1)
    convolved = torch.nn.functional.silu(layer.conv(convolved))
    mixed = layer.mix(convolved, dt)

    ahead, back, diagonal = matrices(arrays)
    x = arrays["core_x"].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    if combine == "quasiseparable":
        assert_close((arrays["mixer_matrix"] @ x).transpose(1, 2), mixed, **EXACT)
        assert_close(mixed.flatten(2), arrays["mixer_output"], **EXACT)
    elif combine == "add":
        assert_close(((ahead + back + diagonal) @ x).transpose(1, 2), mixed, **EXACT)
    elif combine == "multiply":
        assert_close(((ahead @ x) * (back @ x) + diagonal @ x).transpose(1, 2), mixed, **EXACT)
    else:
        parts = [((matrix + diagonal) @ x).transpose(1, 2) for matrix in (ahead, back)]
        assert_close(torch.cat(parts, dim=2), mixed, **EXACT)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_every_combination_trains(combine):
    layer = Hydra(8, state=4, head_dim=4, combine=combine, learned_state=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == x.shape and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_mixed_precision_keeps_the_step_sizes_wide():
    layer = Hydra(8, state=4, head_dim=4)
    x = torch.randn(2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        have = layer(x)
    assert have.dtype == torch.bfloat16
    assert_close(have.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "sum"}, "the combinations are quasiseparable, add, multiply, concatenate"),
        ({"taps": 4}, "taps must be odd"),
        ({"head_dim": 5}, "head_dim must divide the inner width 16"),
        ({"head_dim": 4, "groups": 3}, "groups the number of heads"),
    ],
)
def test_bad_arguments_say_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        Hydra(8, **options)
