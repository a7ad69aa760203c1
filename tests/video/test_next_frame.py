"""The next-frame model against a golden one; generation against whole clips, in pieces and for long."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vision_ssm.video import MODELS, NextFrame, convs5_stack, pixel_loss

EXACT = {"rtol": 1e-9, "atol": 1e-11}
UNIT = {"inner.0": "GroupNorm_0", "inner.2": "Conv_0", "inner.3": "GroupNorm_1", "inner.5": "Conv_1"}
PARTS = {
    "join": "action_conv.Conv_0",
    "encoder.0": "encoder.Conv_0",
    **{f"encoder.1.{ours}": f"encoder.ResNetBlock_0.{theirs}" for ours, theirs in UNIT.items()},
    **{f"encoder.3.{ours}": f"encoder.ResNetBlock_1.{theirs}" for ours, theirs in UNIT.items()},
    "decoder.0": "decoder.Conv_0",
    **{f"decoder.1.{ours}": f"decoder.ResNetBlock_0.{theirs}" for ours, theirs in UNIT.items()},
    **{f"decoder.3.{ours}": f"decoder.ResNetBlock_1.{theirs}" for ours, theirs in UNIT.items()},
    "decoder.4": "decoder.LayerNorm_0",
    "decoder.5": "decoder.Dense_0",
}
LAYER = {
    "mixer.output.norm1": "seq.C_D_conv.GroupNorm_0",
    "mixer.output.conv1": "seq.C_D_conv.Conv_0",
    "mixer.output.norm2": "seq.C_D_conv.GroupNorm_1",
    "mixer.output.conv2": "seq.C_D_conv.Conv_1",
    "norm": "norm",
}
SSM = {"lambda_re": "Lambda_re", "lambda_im": "Lambda_im", "log_step": "log_step", "B": "B", "C": "C"}


def names(layers):
    """Golden names of our parameters."""
    found = {"action.weight": "action_embeds.embedding"}
    parts = dict(PARTS)
    for i in range(layers):
        layer = f"sequence_model.layers_{i}"
        parts |= {f"stack.layers.{i}.{ours}": f"{layer}.{theirs}" for ours, theirs in LAYER.items()}
        found |= {f"stack.layers.{i}.mixer.ssm.{ours}": f"{layer}.seq.{theirs}" for ours, theirs in SSM.items()}
    for ours, theirs in parts.items():
        scale = "scale" if "norm" in theirs.rpartition(".")[2].lower() else "kernel"
        bias = theirs.replace("Conv_1", "AddBias_0") if ".inner." in ours else theirs
        found |= {f"{ours}.weight": f"{theirs}.{scale}", f"{ours}.bias": f"{bias}.bias"}
    return found


def ours(name, m, like):
    """A golden weight in our layout."""
    if name.endswith(".C"):
        m = m.permute(3, 2, 0, 1, 4)
    elif name.endswith("kernel") and m.ndim == 4:
        m = m.permute(3, 2, 0, 1)
    elif name.endswith("kernel"):
        m = m.T
    return m.reshape(like.shape).double()


def test_golden_model(golden_file):
    facts = json.loads(golden_file("ops/convs5/video_small.json").read_text())
    arrays = {k: torch.from_numpy(m) for k, m in np.load(golden_file("ops/convs5/video_small.npz")).items()}
    stack = convs5_stack(facts["features"], state=facts["state_real"], layers=facts["layers"], groups=facts["groups"])
    model = NextFrame(
        stack,
        facts["channels"],
        dim=facts["features"],
        encoder=facts["depths"],
        decoder=facts["depths"],
        units=facts["res_blocks"],
        actions=facts["action_dim"],
        action_dim=facts["action_embed"],
    ).double()
    theirs = names(facts["layers"])
    assert {f"w.{name}" for name in theirs.values()} == {key for key in arrays if key.startswith("w.")}
    weights = {key: ours(theirs[key], arrays[f"w.{theirs[key]}"], m) for key, m in model.state_dict().items()}
    model.load_state_dict(weights, strict=True)

    video = arrays["video"].double().movedim(-1, 2).requires_grad_()
    actions = arrays["actions"]
    prediction, _ = model(video[:, :-1], actions[:, 1:4])
    assert_close(prediction, arrays["prediction"].movedim(-1, 2), **EXACT)
    loss = pixel_loss(prediction, video[:, 1:])
    assert_close(loss, arrays["loss"][0], **EXACT)
    loss.backward()
    assert_close(video.grad, arrays["grad_video"].movedim(-1, 2), **EXACT)
    for key, parameter in model.named_parameters():
        wanted = arrays[f"gradnorm_w.{theirs[key]}"]
        assert_close(torch.stack([parameter.grad.norm(), parameter.grad.sum()]), wanted, rtol=1e-8, atol=1e-10)

    frames, _ = model.generate(video.detach(), 2, actions=actions)
    assert_close(frames, arrays["autoregressive"].movedim(-1, 2), **EXACT)


def small(*, state=4, layers=2, **options):
    stack = convs5_stack(4, state=state, layers=layers, groups=2)
    return NextFrame(stack, dim=4, **{"encoder": (32, 32), "decoder": (32, 32), **options})


@pytest.mark.parametrize(
    ("name", "parameters", "stack"), [("convs5_moving_mnist_300", 21.7, 18.9), ("convs5_moving_mnist_600", 7.41, 4.73)]
)
def test_published_sizes(name, parameters, stack):
    """Millions of parameters, to the digits that are known."""
    with torch.device("meta"):
        model = MODELS[name]()
    counts = [sum(m.numel() for m in module.parameters()) / 1e6 for module in (model, model.stack)]
    assert counts == pytest.approx([parameters, stack], abs=0.05)


def test_generation_feeds_frames_back():
    """Each frame that is generated is the one that the whole clip before it predicts."""
    model = small(actions=3).double()
    context, actions = torch.rand(2, 3, 1, 4, 6, dtype=torch.float64) * 2 - 1, torch.randint(-1, 3, (2, 7))
    frames, _ = model.generate(context, 4, actions=actions)
    clip = torch.cat([context, frames], dim=1)
    assert_close(model(clip[:, :-1], actions[:, 1:])[0][:, 2:], frames)


def test_generation_goes_on_from_a_state():
    model = small(actions=2, channels=3).double()
    context, actions = torch.rand(1, 2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 2, (1, 9))
    whole, last = model.generate(context, 7, actions=actions)
    first, state = model.generate(context, 3, actions=actions[:, :5])
    second, state = model.generate(first[:, -1:], 4, actions=actions[:, 4:], state=state)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert_close(state, last)


def test_a_stream_has_no_end_and_with_actions_one_frame_for_each():
    model = small()
    context = torch.zeros(1, 2, 1, 4, 4)
    frames = [frame for frame, _ in islice(model.stream(context), 12)]
    assert_close(torch.stack(frames, dim=1), model.generate(context, 12)[0])
    assert len(list(model.stream(context, actions=torch.zeros(1, 5, dtype=torch.long)))) == 3
    assert not frames[0].requires_grad


def test_clips_that_share_a_row_do_not_see_each_other():
    model = small().double()
    a, b = torch.rand(2, 1, 3, 1, 4, 4, dtype=torch.float64)
    reset = torch.tensor([[False, False, False, True, False, False]])
    together, _ = model(torch.cat([a, b], dim=1), reset=reset)
    assert_close(together, torch.cat([model(a)[0], model(b)[0]], dim=1))


@torch.no_grad()
def test_rows_may_change_clips_at_different_frames():
    """With actions; the states at the end are those of the last clips."""
    model = small(actions=3).double()
    clips = [torch.rand(1, length, 1, 8, 8, dtype=torch.float64) * 2 - 1 for length in (5, 4, 5, 4)]
    given = [torch.randint(-1, 3, clip.shape[:2]) for clip in clips]
    alone = [model(clip, one) for clip, one in zip(clips, given, strict=True)]

    def rows(parts):  # the first row changes after five frames, the second after four
        return torch.cat([torch.cat(parts[:2], dim=1), torch.cat(parts[3:1:-1], dim=1)])

    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 5] = reset[1, 4] = True
    together, state = model(rows(clips), rows(given), reset=reset)
    assert_close(together, rows([prediction for prediction, _ in alone]), rtol=0, atol=1e-12)
    for layer, found in enumerate(state):
        assert_close(found, torch.cat([alone[1][1][layer], alone[2][1][layer]]), rtol=0, atol=1e-12)


def test_generation_goes_on_from_a_saved_state_to_the_last_bit(tmp_path):
    model = small(encoder=(32, 64), decoder=(32, 64))
    context = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    whole, last = model.generate(context, 9)
    frames, state = model.generate(context, 4)
    torch.save({"frame": frames[:, -1:], "state": state}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    more, after = model.generate(kept["frame"], 5, state=kept["state"])
    assert torch.equal(torch.cat([frames, more], dim=1), whole)
    assert all(torch.equal(found, wanted) for found, wanted in zip(after, last, strict=True))


@torch.no_grad()
def test_one_clip_and_one_frame_are_as_good_as_many():
    model = small(encoder=(32, 64), decoder=(32, 64))
    clips = torch.rand(3, 4, 1, 8, 8) * 2 - 1
    together, _ = model(clips)
    assert_close(torch.cat([model(clip[None])[0] for clip in clips]), together, rtol=0, atol=1e-6)
    assert_close(model(clips[:, :1])[0], together[:, :1], rtol=0, atol=1e-6)
    frames, _ = model.generate(clips[:1, :1], 1)
    assert frames.shape == (1, 1, 1, 8, 8)


def test_unknown_actions_have_an_embedding_of_their_own():
    model = small(actions=2)
    frame = torch.zeros(1, 1, 1, 4, 4)
    model(frame, torch.tensor([[-1]]))[0].sum().backward()
    assert model.action.weight.grad.any(dim=1).tolist() == [False, False, True]
    assert_close(model(frame)[0], model(frame, torch.tensor([[0]]))[0])


@torch.no_grad()
def test_compilation_and_export_see_the_whole_model():
    """Without a break; the operator of the scan is one node."""
    model = small(actions=3, layers=1, encoder=(32,), decoder=(32,))
    clip, actions = torch.rand(1, 3, 1, 4, 4) * 2 - 1, torch.tensor([[0, 2, -1]])
    wanted, state = model(clip, actions)
    compiled, _ = torch.compile(model, backend="aot_eager", fullgraph=True)(clip, actions)
    assert_close(compiled, wanted)
    exported = torch.export.export(model, (clip, actions, state))
    assert_close(exported.module()(clip, actions, state)[0], model(clip, actions, state)[0])
    assert sum("linear_scan" in str(node.target) for node in exported.graph.nodes) == 1


def test_mixed_precision_is_finite():
    model = small()
    clip = torch.rand(1, 6, 1, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        prediction, _ = model(clip[:, :-1])
        loss = pixel_loss(prediction.float(), clip[:, 1:])
    loss.backward()
    assert loss.isfinite() and all(m.grad.isfinite().all() for m in model.parameters())


def test_training_in_mixed_precision_follows_float32():
    """Fifty steps on dots that move: the loss falls by half, and differs by 5 percent at most at any step."""

    def losses(mixed):
        torch.manual_seed(0)
        model, found = small(encoder=(32, 32), decoder=(32, 32)), []
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(50):
            at = torch.rand(2, 1, 2) * 4 + 2 + torch.arange(6)[:, None] * (torch.rand(2, 1, 2) - 0.5)
            near = torch.exp(-(torch.arange(8.0)[:, None] - at[..., None, :]).square() / 4)
            clip = (2 * near[..., :, None, 0] * near[..., None, :, 1] - 1)[:, :, None]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                prediction, _ = model(clip[:, :-1])
            loss = pixel_loss(prediction.float(), clip[:, 1:])
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        assert all(m.isfinite().all() for m in model.parameters())
        return torch.stack(found)

    mixed, wide = losses(True), losses(False)
    assert wide[-5:].mean() < wide[0] / 2
    assert_close(mixed, wide, rtol=0.05, atol=0)
    assert not torch.equal(mixed, wide)


@pytest.mark.slow
def test_ten_thousand_frames_stay_finite():
    model = small(layers=1, state=2, encoder=(32,), decoder=(32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(10):  # weights that moved far, and eigenvalues with them
        optimizer.zero_grad()
        clip = torch.rand(2, 8, 1, 2, 2) * 2 - 1
        pixel_loss(model(clip[:, :-1])[0], clip[:, 1:]).backward()
        optimizer.step()
    sizes = set()
    for frame, state in islice(model.stream(torch.rand(1, 5, 1, 2, 2) * 2 - 1), 10_000):
        assert frame.isfinite().all() and all(m.isfinite().all() for m in state)
        sizes.add(sum(m.untyped_storage().nbytes() for m in state))
    assert len(sizes) == 1  # all memory that there is


def test_bad_input_is_refused():
    model = small(actions=3)
    clip = torch.zeros(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"frames must be \(clips, frames, 1, height, width\)"):
        model(clip[:, :, 0])
    with pytest.raises(ValueError, match="frames must be"):
        model(clip.expand(-1, -1, 3, -1, -1))
    with pytest.raises(ValueError, match="not empty"):
        model.stream(clip[:, :0])
    with pytest.raises(ValueError, match=r"multiples of 2; got \(3, 4\)"):
        model(clip[..., :3, :])
    with pytest.raises(ValueError, match="from 0 to 2, or -1 for unknown; got 0 to 3"):
        model(clip, torch.tensor([[0, 1, 3]] * 2))
    with pytest.raises(ValueError, match="got -2 to 0"):
        model(clip, torch.tensor([[0, -2, 0]] * 2))
    with pytest.raises(ValueError, match="actions must be integers"):
        model(clip, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="actions must be integers"):
        model(clip, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="each of the 3 frames needs one action; got 2"):
        model(clip, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="beyond the 3 frames"):
        model.stream(clip, actions=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="one for each of 5 frames, context included; got 4"):
        model.generate(clip, 2, actions=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="frames must be at least 1"):
        model.generate(clip, 0)
    with pytest.raises(ValueError, match="2 layers need as many states"):
        model.generate(clip, 1, state=small(layers=1)(clip)[1])
    with pytest.raises(ValueError, match="state must have shape"):
        model.generate(clip, 1, state=small(state=6)(clip)[1])
    with pytest.raises(ValueError, match="as many widths"):
        small(encoder=(32,))
    for batch, height, width in ((1, 4, 4), (2, 8, 4), (2, 2, 8)):
        with pytest.raises(ValueError, match="state must have shape"):
            model.generate(torch.zeros(batch, 3, 1, height, width), 1, state=model(clip)[1])
    for reset in (torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"reset must be boolean of shape \(2, 3\)"):
            model(clip, reset=reset)
    with pytest.raises(ValueError, match="2 layers need as many states; got a tensor"):
        model(clip, state=torch.zeros(2, 2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"numbers from -1 to 1; got torch\.uint8"):
        model(clip.to(torch.uint8))
    with pytest.raises(ValueError, match=r"frames are torch\.float64, the model's weights torch\.float32; convert"):
        model.stream(clip.double())
    for widths in ((32, 40), (32, 0)):
        with pytest.raises(ValueError, match="multiples of 32"):
            small(encoder=widths)
    for groups in (3, 0):
        with pytest.raises(ValueError, match="groups must divide dim"):
            convs5_stack(4, state=4, groups=groups)
