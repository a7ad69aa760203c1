"""ClipClassifier: streams equal clips, on maps of any backbone; it tells what no single frame shows."""

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.video.clips import ClipClassification
from vision_ssm.video import ClipClassifier
from vision_ssm.video.mixers import TEMPORAL_MIXERS

EXACT = {"rtol": 0, "atol": 1e-5}
BACKBONES = {
    "test_vmamba": {},
    "test_vim": {"img_size": (48, 32)},
    "test_resnet": {},
    "mambaout_femto": {"depths": (1, 1), "dims": (8, 8)},
}


def classifier(backbone="test_vmamba", **options):
    return ClipClassifier(backbone, **{"in_channels": 1, "classes": 3, "dim": 8, **options}).eval()


@pytest.mark.parametrize("mixer", TEMPORAL_MIXERS)
@torch.no_grad()
def test_streams_and_pieces_equal_the_clip(mixer):
    model, video = classifier(mixer=mixer), torch.randn(2, 5, 1, 37, 51)
    whole, last = model(video)
    assert whole.shape == (2, 5, 3)
    state, found = None, []
    for frame in video.unbind(1):
        logits, state = model.step(frame, state)
        found.append(logits)
    assert_close(torch.stack(found, dim=1), whole, **EXACT)
    assert_close(state, last, **EXACT)
    first, state = model(video[:, :2])
    assert_close(torch.cat([first, model(video[:, 2:], state)[0]], dim=1), whole, **EXACT)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_any_backbone_serves(backbone):
    """Maps with channels first and last, square or not where the backbone lets them be."""
    model = classifier(backbone, in_channels=3, **BACKBONES[backbone])
    size = (48, 48) if "img_size" in BACKBONES[backbone] else (48, 32)
    video = torch.randn(1, 2, 3, *size)
    logits, state = model(video)
    assert logits.shape == (1, 2, 3)
    (reduction,) = model.backbone.feature_info.reduction()
    assert state[0].shape == (1, *(-(-pixels // reduction) for pixels in size), 4, 2)
    assert_close(model.step(video[:, 1], model.step(video[:, 0])[1])[0], logits[:, 1], **EXACT)


@torch.no_grad()
def test_frames_matter_to_all_that_follow_and_with_identity_to_none():
    video = torch.randn(1, 4, 1, 32, 32)
    other = video.clone()
    other[:, 1] += 1
    for mixer, changed in {"convs5": [False, True, True, True], "identity": [False, True, False, False]}.items():
        model = classifier(mixer=mixer)
        differs = (model(video)[0] - model(other)[0]).abs().amax(dim=2)[0] > 1e-6
        assert differs.tolist() == changed


@torch.no_grad()
def test_clips_that_share_a_row_do_not_see_each_other():
    model, (a, b) = classifier(), torch.randn(2, 1, 3, 1, 32, 32)
    reset = torch.tensor([[False, False, False, True, False, False]])
    together, _ = model(torch.cat([a, b], dim=1), reset=reset)
    assert_close(together, torch.cat([model(a)[0], model(b)[0]], dim=1), **EXACT)


def test_a_mixer_may_be_a_function_of_the_width():
    layer = torch.nn.Identity()
    widths = []
    assert classifier(mixer=lambda dim: widths.append(dim) or layer).stack is layer
    assert widths == [8]


def test_bad_input_is_refused():
    model, video = classifier(), torch.zeros(1, 2, 1, 32, 32)
    with pytest.raises(ValueError, match="unknown mixer 'convs6'; mixers are convs5, conv_lstm, identity"):
        classifier(mixer="convs6")
    with pytest.raises(ValueError, match="has no map of out_index 9"):
        classifier(out_index=9)
    with pytest.raises(ValueError, match="must be at least 1; got in_channels=1, classes=0"):
        classifier(classes=0)
    with pytest.raises(ValueError, match=r"video must be \(clips, frames, 1, height, width\) and not empty"):
        model(video[:, :0])
    for wrong in (video[:, 0], video.expand(-1, -1, 3, -1, -1)):
        with pytest.raises(ValueError, match="video must be"):
            model(wrong)
    for mixer in TEMPORAL_MIXERS:
        for reset in (torch.zeros(2, 1, dtype=torch.bool), torch.zeros(1, 2)):
            with pytest.raises(ValueError, match=r"reset must be boolean of shape \(1, 2\)"):
                classifier(mixer=mixer)(video, reset=reset)
    with pytest.raises(ValueError, match="2 layers need as many states"):
        model(video, classifier(mixer="identity")(video)[1])
    with pytest.raises(ValueError, match="state must have shape"):
        model(video, model(torch.zeros(1, 1, 1, 64, 64))[1])


CONFIG = "video/moving_digits_heading"


def digits():
    """One that is a bar, for want of the files of real ones."""
    image = torch.zeros(1, 14, 14)
    image[:, 3:11, 6:9] = 1
    return [{"image": image, "label": torch.tensor(1)}]


def test_a_step_of_the_config():
    config = load_config(CONFIG, ["train_dataloader.batch_size=4", "model.net.dim=8"])
    config.train_dataloader.dataset.dataset.digits = {"type": digits}
    batch = next(iter(build_loader(config.train_dataloader)))
    assert batch["video"].shape == (4, 6, 1, 32, 32) and batch["label"].max() < len(config.classes)
    task = build(config.model)
    assert isinstance(task, ClipClassification)
    task(**batch, mode="loss")["loss"].backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []

    (metric,) = build(config.test_evaluator)
    task.eval()
    metric.process(batch, task(**batch, mode="predict"))
    right = task.net(batch["video"])[0][:, -1].argmax(dim=1) == batch["label"]
    assert metric.evaluate(4) == {"accuracy/top1": pytest.approx(right.float().mean().item())}


def test_the_identity_twin_of_the_config_has_nothing_over_time():
    nets = [build(load_config(CONFIG, overrides).model.net) for overrides in ([], ["model.net.mixer=identity"])]
    sizes = [sum(parameter.numel() for parameter in net.stack.parameters()) for net in nets]
    assert sizes[0] > sizes[1] == 0
