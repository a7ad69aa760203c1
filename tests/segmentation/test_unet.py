"""SSMUNet on backbones of this package and of timm."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.segmentation import SSMEncoder, SSMUNet
from vision_ssm.segmentation.unet import ChannelsFirst, levels

BACKBONES = ["test_vmamba", "test_convnext", "test_resnet", "vgg11"]


def unet(backbone: str = "test_vmamba", **arguments) -> SSMUNet:
    return SSMUNet(backbone, **{"in_channels": 2, "out_channels": 3} | arguments)


@pytest.mark.parametrize("size", [(1, 1), (33, 51), (64, 32)], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_have_the_size_of_the_image(backbone, size):
    logits = unet(backbone).eval()(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


def test_padding_repeats_the_last_row_and_column():
    net = unet().eval()
    image = torch.randn(1, 2, 30, 45)
    padded = nn.functional.pad(image, (0, 64 - 45, 0, 32 - 30), mode="replicate")
    assert_close(net(image), net(padded)[..., :30, :45])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_is_trained(backbone):
    net = unet(backbone, deep_supervision=True)
    sum(logits.square().mean() for logits in net(torch.randn(2, 2, 64, 64))).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_no_map_to_decode_is_refused():
    with pytest.raises(ValueError, match="out_indices must name at least one map"):
        unet(out_indices=[])


def test_deep_supervision_predicts_every_level_in_training_only():
    net = unet(deep_supervision=True)
    image = torch.randn(1, 2, 33, 50)
    sizes = [tuple(logits.shape[-2:]) for logits in net(image)]
    assert sizes == [(33, 50), (17, 25), (9, 13), (5, 7), (3, 4)]
    assert net.eval()(image).shape == (1, 3, 33, 50)
    assert unet()(image).shape == (1, 3, 33, 50)


def test_fewer_maps_make_a_shallower_net():
    full, shallow = unet(), unet(out_indices=(0, 1, 2))
    assert (full.reductions[-1], shallow.reductions[-1]) == ([32, 32], [16, 16])
    assert sum(p.numel() for p in shallow.parameters()) < sum(p.numel() for p in full.parameters())


def test_the_identity_twin_has_the_same_decoder_and_no_scan():
    ssm, twin = unet(), unet(mixer="identity")
    decoder = {name for name in ssm.state_dict() if not name.startswith("encoder.")}
    assert decoder == {name for name in twin.state_dict() if not name.startswith("encoder.")}
    assert any(name.endswith("A_log") for name in ssm.state_dict())
    assert not any(name.endswith("A_log") for name in twin.state_dict())


def test_it_learns(device):
    net = unet().to(device)
    image = torch.randn(2, 2, 32, 32, device=device)
    target = (image[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(net(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_maps_with_channels_last_are_turned():
    class Pyramid(nn.Module):
        feature_info = None

        def forward(self, image):
            return [image.permute(0, 2, 3, 1)]

    image = torch.randn(1, 2, 3, 4)
    assert_close(ChannelsFirst(Pyramid())(image)[0], image)


def test_an_unknown_backbone_is_refused_with_names_that_exist():
    with pytest.raises(ValueError, match=r"unknown backbone 'vmamba_nanoo'.*vmamba_nano"):
        unet("vmamba_nanoo")


def test_a_misspelt_backbone_argument_is_refused():
    with pytest.raises(TypeError, match="mixre"):
        unet(mixre="identity")


def test_maps_that_do_not_double_are_refused():
    with pytest.raises(ValueError, match=r"test_vit are reduced by \[16, 16, 16\].*double from"):
        unet("test_vit")
    with pytest.raises(ValueError, match=r"reduced by \[3, 6\]"):
        levels("odd", [3, 6], 2)
    with pytest.raises(ValueError, match="nothing to decode"):
        levels("flat", [1], 2)


def test_widths_must_fit_the_levels():
    with pytest.raises(ValueError, match=r"5 decoder levels .* got 2 decoder_channels"):
        unet(decoder_channels=(8, 16))
    assert unet(decoder_channels=(4, 4, 8, 8, 8)).heads[0].in_channels == 4


def test_strides_of_volumes_reach_the_decoder():
    strides = (1, (1, 2, 2), 2)
    net = SSMUNet(
        "ssm3d_nano",
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        dims=(4, 6, 8),
        depths=(0, 1, 1),
        strides=strides,
        kernel_sizes=((1, 3, 3), (1, 3, 3), 3),
    )
    assert net.reductions == [[1, 1, 1], [1, 2, 2], [2, 4, 4]] and not net.image_levels
    assert (
        net.encoder.stages[1].downsample.weight.shape[2:] == net.encoder.stages[1].blocks[0].mixer.conv.weight.shape[2:]
    )
    maps = net.encoder(torch.randn(1, 1, 3, 5, 8))
    assert [tuple(fmap.shape[2:]) for fmap in maps] == [(3, 5, 8), (3, 3, 4), (2, 2, 2)]


def test_every_cell_reaches_a_strided_stage():
    encoder = SSMEncoder(1, dims=(4,), depths=(0,), kernel_sizes=(1,))
    image = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
    encoder(image)[0].square().sum().backward()
    assert image.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1,)}, "every stage needs an entry; got 2 stages"),
        ({"strides": (2, 2, 2)}, "every stage needs an entry"),
        ({"strides": (2, 3)}, "strides must be 1 or 2"),
        ({"strides": (2, (2, 2))}, "strides must be one size or 3"),
        ({"kernel_sizes": (3, 2)}, "kernel_size must be odd"),
        ({"strides": (2, 1)}, "maps of ssm3d_nano are reduced by"),
        ({"backbone": "vmamba_nano"}, "unknown backbone of volumes 'vmamba_nano'; there are ssm3d_nano, ssm3d_small"),
        ({"backbone": "ssm3d_nano", "spatial_dims": 2}, "volumes, spatial_dims=3, take ssm3d_nano"),
    ],
)
def test_wrong_encoders_of_volumes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        unet(**{"backbone": "ssm3d_nano", "spatial_dims": 3, "dims": (4, 6), "depths": (1, 1)} | arguments)


def test_a_misspelt_argument_of_an_encoder_is_refused():
    with pytest.raises(TypeError, match="mixre"):
        unet("ssm3d_nano", spatial_dims=3, mixre="identity")
