"""CineUNet: streams equal films, at every level and any size; without its layers it is the network of images."""

import pytest
import torch
from torch.testing import assert_close

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
