"""CineUNet: streams equal films, at every level and any size; without its layers it is the network of images."""

import nibabel
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.video.clips import CineSegmentation
from vision_ssm.segmentation import CineUNet, SSMUNet
from vision_ssm.video.mixers import TEMPORAL_MIXERS

EXACT = {"rtol": 0, "atol": 1e-5}


def unet(**options):
    return SSMUNet("test_vmamba", in_channels=1, out_channels=3, decoder_channels=(4, 4, 8, 8, 16), **options)


def cine(mixer="convs5", levels=(-1, -2), **options):
    return CineUNet(unet(**options), mixer=mixer, levels=levels).eval()


@pytest.mark.parametrize("mixer", TEMPORAL_MIXERS)
@pytest.mark.parametrize("size", [(1, 1), (33, 70)], ids=str)
@torch.no_grad()
def test_streams_and_pieces_equal_the_film(mixer, size):
    model, video = cine(mixer), torch.randn(2, 4, 1, *size)
    whole, last = model(video)
    assert whole.shape == (2, 4, 3, *size)
    state, found = None, []
    for frame in video.unbind(1):
        logits, state = model.step(frame, state)
        found.append(logits)
    assert_close(torch.stack(found, dim=1), whole, **EXACT)
    assert_close(state, last, **EXACT)
    first, state = model(video[:, :3])
    assert_close(torch.cat([first, model(video[:, 3:], state)[0]], dim=1), whole, **EXACT)


@torch.no_grad()
def test_with_identity_it_is_the_net():
    model, video = cine("identity"), torch.randn(2, 3, 1, 33, 40)
    logits, state = model(video)
    assert_close(logits, torch.stack([model.net(frame) for frame in video.unbind(1)], dim=1))
    assert state == ((), ())
    assert not list(model.over_time.parameters())


@pytest.mark.parametrize("levels", [(0,), (1, -3), (-1,)], ids=str)
@torch.no_grad()
def test_frames_matter_to_all_that_follow(levels):
    model = cine(levels=levels)
    widths = [model.net.channels[level] for level in levels]
    assert [stack.layers[0].mixer.ssm.dim for stack in model.over_time] == widths
    video = torch.randn(1, 3, 1, 32, 32)
    other = video.clone()
    other[:, 1, :, 7, 9] += 3
    differs = (model(video)[0] - model(other)[0]).abs().amax(dim=(2, 3, 4))[0] > 1e-6
    assert differs.tolist() == [False, True, True]


@torch.no_grad()
def test_films_that_share_a_row_do_not_see_each_other():
    model, (a, b) = cine(), torch.randn(2, 1, 2, 1, 40, 33)
    reset = torch.tensor([[False, False, True, False]])
    together, _ = model(torch.cat([a, b], dim=1), reset=reset)
    assert_close(together, torch.cat([model(a)[0], model(b)[0]], dim=1), **EXACT)


def test_every_parameter_is_trained_with_deep_supervision():
    model = cine(deep_supervision=True).train()
    logits, _ = model(torch.randn(2, 2, 1, 64, 66))
    assert [tuple(m.shape) for m in logits[:2]] == [(2, 2, 3, 64, 66), (2, 2, 3, 32, 33)]
    sum(m.square().mean() for m in logits).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_bad_input_is_refused():
    model, video = cine(), torch.zeros(1, 2, 1, 32, 32)
    for wrong in (video[:, 0], video.expand(-1, -1, 2, -1, -1), video[:, :0]):
        with pytest.raises(ValueError, match=r"video must be \(films, frames, 1, height, width\)"):
            model(wrong)
    for mixer in TEMPORAL_MIXERS:
        for reset in (torch.zeros(2, 1, dtype=torch.bool), torch.zeros(1, 2)):
            with pytest.raises(ValueError, match=r"reset must be boolean of shape \(1, 2\)"):
                cine(mixer)(video, reset=reset)
    with pytest.raises(ValueError, match="2 levels need as many states; got 1"):
        model(video, cine(levels=(-1,))(video)[1])
    with pytest.raises(ValueError, match="state must have shape"):
        model(video, model(torch.zeros(1, 1, 1, 64, 64))[1])
    for levels in ((-7,), (6,), (-1, 5)):
        with pytest.raises(ValueError, match="levels must be different ones from -6 to 5"):
            cine(levels=levels)
    with pytest.raises(ValueError, match="unknown mixer"):
        cine("mamba")
    volumes = SSMUNet("ssm3d_nano", spatial_dims=3, in_channels=1, out_channels=2)
    with pytest.raises(ValueError, match="spatial_dims=2"):
        CineUNet(volumes)


@pytest.fixture(scope="module")
def acdc(tmp_path_factory):
    """Five patients in ACDC's layout: a disc of class 3 that shrinks over six frames; the first and the fourth have
    labels.
    """
    root = tmp_path_factory.mktemp("acdc")
    x, y = np.mgrid[:24, :20] - 11
    discs = np.stack([x**2 + y**2 < (8 - t) ** 2 for t in range(6)], axis=-1)[:, :, None].repeat(2, axis=2)
    for patient in (f"patient{number:03}" for number in range(1, 6)):
        (root / patient).mkdir()
        nibabel.save(nibabel.Nifti1Image(100.0 * discs, np.eye(4)), root / patient / f"{patient}_4d.nii.gz")
        for frame in (1, 4):
            label = nibabel.Nifti1Image(3 * discs[..., frame - 1].astype(np.uint8), np.eye(4))
            nibabel.save(label, root / patient / f"{patient}_frame{frame:02}_gt.nii.gz")
    return root


@pytest.fixture
def config(acdc):
    config = load_config("video/acdc_cine_unet", [f"data_root={acdc}", "model.net.net.backbone=test_vmamba"])
    for loader in ("train_dataloader", "val_dataloader"):
        options = config[loader].dataset
        (options.dataset if "dataset" in options else options).update(frames=4, size=(32, 24), spacing=1.0)
    config.train_dataloader.batch_size = 2
    return config


def test_a_step_of_the_config(config):
    batch = next(iter(build_loader(config.train_dataloader)))
    assert batch["video"].shape == batch["label"].shape == (2, 4, 1, 32, 24)
    task = build(config.model)
    task(**batch, mode="loss")["loss"].backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []


def test_frames_with_labels_are_scored(config):
    task, (metric,) = build(config.model).eval(), build(config.test_evaluator)
    batch = next(iter(build_loader(config.val_dataloader)))
    (found,) = task(**batch, mode="predict")
    assert found["prediction"].shape == found["label"].shape == (1, 32, 24, 2)
    labelled = (batch["label"][0] >= 0).flatten(1).all(dim=1)
    logits = task(batch["video"])[0][labelled]
    assert torch.equal(found["prediction"][0], logits.argmax(dim=1).movedim(0, -1))
    metric.process(batch, [{**found, "prediction": found["label"]}])
    assert metric.evaluate(1)["dice/left_ventricle"] == 1


class Turned(nn.Module):
    def forward(self, image, label):
        return image.flip(-1), label.flip(-1)


def test_variants_change_all_frames_alike_and_frames_without_labels_train_nothing():
    losses = []

    def loss(logits, label):
        losses.append((logits, label))
        return logits.square().mean()

    video, label = torch.randn(2, 3, 1, 32, 32), torch.randint(0, 3, (2, 3, 1, 32, 32))
    label[0, 1] = label[1, 0] = label[1, 2] = -1
    model = cine()
    task = CineSegmentation(model, loss, augment=[Turned()])
    task(video, label, mode="loss")
    ((logits, target),) = losses
    assert torch.equal(target, torch.stack([label[0, 0], label[0, 2], label[1, 1]]).flip(-1))
    expected = model(video.flip(-1))[0]
    assert_close(logits, torch.stack([expected[0, 0], expected[0, 2], expected[1, 1]]))
    with pytest.raises(ValueError, match="no frame of these clips has labels"):
        task(video, torch.full_like(label, -1), mode="loss")
    assert task(video, mode="predict")[0]["prediction"].shape == (1, 32, 32, 3)
