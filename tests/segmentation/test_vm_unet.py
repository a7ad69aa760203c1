"""VM-UNet's own parts."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.testing import assert_close

from vision_ssm.segmentation.vm_unet import PatchExpanding2d, Up, VMUNet


def network(**arguments):
    return VMUNet(2, 1, 3, backbone="test_vmamba", depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), **arguments)


def test_it_has_the_parameters_that_others_count():
    with torch.device("meta"):
        net = VMUNet(2, in_channels=3, out_channels=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 27_427_561


def test_patch_expanding_turns_channels_into_cells():
    expanding = PatchExpanding2d(6, 5, 2)
    nn.init.normal_(expanding.norm.weight)
    x = torch.randn(2, 6, 3, 4)
    weight = expanding.expand.weight.view(2, 2, 5, 6).permute(2, 0, 1, 3).reshape(20, 6, 1, 1)
    cells = F.pixel_shuffle(F.conv2d(x, weight), 2)
    assert_close(expanding(x), expanding.norm(cells.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_skips_are_added():
    up = Up(PatchExpanding2d(6, 5, 2), [])
    coarse, skip = torch.randn(1, 6, 3, 4), torch.randn(1, 5, 6, 8)
    assert_close(up(coarse, skip), up.expand(coarse) + skip)


@pytest.mark.parametrize("level", range(3))
def test_every_skip_reaches_the_logits(level):
    """What the decoder brings from below is cut off at one level; the skip of that level is still there."""
    net = network().eval()
    net.decoder.up[level].expand.register_forward_hook(lambda module, inputs, output: 0 * output)
    image = torch.randn(1, 1, 32, 32, requires_grad=True)
    net(image).sum().backward()
    assert image.grad.any()


def test_depth_is_stochastic_most_where_the_two_halves_meet():
    net = network(drop_path_rate=0.3)

    def rates(*parts):
        return [module.drop_prob for part in parts for module in part.modules() if isinstance(module, DropPath)]

    assert rates(net.stages) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rates(net.deepest, *net.decoder.up) == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match=r"spatial_dims=2; got spatial_dims=3\. For volumes there are SSMUNet"):
        VMUNet(3, 1, 2)
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet18'; the VMambas are .*vmamba_tiny"):
        VMUNet(2, 1, 2, backbone="resnet18")
    with pytest.raises(ValueError, match="depths and dims must have one entry a stage"):
        VMUNet(2, 1, 2, backbone="test_vmamba", decoder_depths=(2, 2, 1))
