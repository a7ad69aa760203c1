"""ConvLSTM and the causal Transformer: whole clips, pieces and frames alike, nothing from the future."""

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.layers import TemporalStack
from vision_ssm.video import MODELS, ConvLSTM, FrameTransformer, NextFrame


def stacks():
    return {
        "conv_lstm": TemporalStack([ConvLSTM(4), ConvLSTM(4)]),
        "cached": FrameTransformer(4, width=8, heads=2, layers=2, patch=2),
        "recomputed": FrameTransformer(4, width=8, heads=2, layers=2, patch=2, cache=False),
    }


@pytest.fixture(params=["conv_lstm", "cached", "recomputed"])
def stack(request):
    return stacks()[request.param].double()


def clip(frames=5):
    return torch.randn(frames, 2, 4, 6, 4, dtype=torch.float64)


def test_pieces_and_frames_are_the_whole(stack):
    u = clip()
    whole, last = stack(u)
    state, found = None, []
    for piece in u.split([2, 1, 2]):
        y, state = stack(piece, state)
        found.append(y)
    assert_close(torch.cat(found), whole)
    assert_close(state, last)


def test_outputs_depend_on_all_frames_so_far_and_no_later_one(stack):
    u = clip().requires_grad_()
    stack(u)[0][2, 0, 0, 0, 0].backward()
    reached = u.grad.abs().amax(dim=(2, 3, 4)) > 0
    assert reached[:3, 0].all()
    assert not reached[3:].any() and not reached[:, 1].any()


def test_the_cache_changes_nothing():
    cached, recomputed = (stacks()[name].double() for name in ("cached", "recomputed"))
    recomputed.load_state_dict(cached.state_dict(), strict=True)
    u = clip()
    assert_close(cached(u)[0], recomputed(u)[0])
    models = [NextFrame(stack, dim=4, encoder=(32, 32), decoder=(32, 32)).double() for stack in (cached, recomputed)]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    context = torch.rand(1, 2, 1, 8, 8, dtype=torch.float64)
    (frames, keys), (again, seen) = (model.generate(context, 4) for model in models)
    assert_close(frames, again)
    assert keys[0].shape == (2, 1, 2, 5, 2, 2, 4) and seen[0].shape == (5, 1, 4, 4, 4)


def test_patches_and_frames_have_places():
    """Without them the outputs for equal tokens would be equal."""
    y, _ = stacks()["cached"](torch.ones(3, 1, 4, 4, 4))
    assert not torch.allclose(y[0, 0, :2, :2], y[0, 0, 2:, :2], atol=1e-3)
    assert not torch.allclose(y[0], y[2], atol=1e-3)


def test_the_recurrence_of_conv_lstm():
    """By its definition, at a single place, where a convolution is its central matrix."""
    layer, u = ConvLSTM(3).double(), torch.randn(3, 1, 1, 1, 3, dtype=torch.float64)
    across = layer.across.weight[:, :, 1, 1]
    h = cell = torch.zeros(3, dtype=torch.float64)
    for t in range(3):
        gates = layer.inward.weight[:, :, 1, 1] @ u[t].flatten() + layer.inward.bias + across @ h
        enter, keep, show = torch.sigmoid(gates[:9]).split(3)
        cell = keep * cell + enter * torch.tanh(gates[9:])
        h = show * torch.tanh(cell)
        assert_close(layer(u)[0][t].flatten(), layer.norm(u[t].flatten() + h))
    assert_close(layer(u)[1].flatten(), torch.cat([h, cell]))
    assert layer.inward.bias.tolist() == [0] * 3 + [1] * 3 + [0] * 6


def test_conv_lstm_resets():
    layer = ConvLSTM(4).double()
    a, b = clip(3), clip(2)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[3] = True
    y, last = layer(torch.cat([a, b]), reset=reset)
    assert_close(y, torch.cat([layer(a)[0], layer(b)[0]]))
    assert_close(last, layer(b)[1])


@pytest.mark.parametrize("name", ["conv_lstm_moving_mnist", "transformer_moving_mnist"])
def test_named_models_build(name):
    with torch.device("meta"):
        frames, _ = MODELS[name]()(torch.zeros(1, 3, 1, 64, 64))
    assert frames.shape == (1, 3, 1, 64, 64)


def test_mixed_precision_is_finite(stack):
    stack.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = stack(clip().float())
        y = y + stack(clip(1).float(), state)[0]
    y.float().sum().backward()
    assert all(m.grad.isfinite().all() for m in stack.parameters())


def test_bad_input_is_refused():
    lstm, cached, recomputed = stacks().values()
    u = clip().float()
    for stack in (lstm, cached, recomputed):
        with pytest.raises(ValueError, match="clips must be"):
            stack(u[..., :3])
        with pytest.raises(ValueError, match="state"):
            stack(u, stack(u[:, :1])[1])
        with pytest.raises(ValueError, match="state"):
            stack(u, stack(u[:, :, :2])[1])
        with pytest.raises(ValueError, match="state"):
            stack(u, stack(u.transpose(2, 3))[1])  # maps of as many places
    with pytest.raises(ValueError, match="2 tensors"):
        cached(u, FrameTransformer(4, width=12, heads=2, layers=2, patch=2)(u)[1])
    with pytest.raises(ValueError, match=r"reset must be boolean of shape \(5, 2\)"):
        lstm(u, reset=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no resets"):
        cached(u, reset=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"multiples of the patch 2; got \(3, 6\)"):
        cached(u[:, :, :3])
    with pytest.raises(ValueError, match="multiple of 4 and of heads"):
        FrameTransformer(4, width=10)
    for name in ("dim", "width", "heads", "layers", "patch"):
        with pytest.raises(ValueError, match=f"must be at least 1; got .*{name}=0"):
            FrameTransformer(**{"dim": 4, "width": 8, "heads": 2, name: 0})
    for kernel in (2, -1):
        with pytest.raises(ValueError, match="kernel must be odd"):
            ConvLSTM(4, kernel=kernel)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        ConvLSTM(0)
