"""UltraLight VM-UNet's own parts."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.kernels import raster
from vision_ssm.layers.mamba import AlongRoutes
from vision_ssm.segmentation.ultralight_vm_unet import ChannelBridge, ParallelMamba, SpatialBridge, UltraLightVMUNet


def test_it_has_the_parameters_of_the_paper():
    net = UltraLightVMUNet(2, in_channels=3, out_channels=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 49_457


def test_four_parts_share_one_mamba():
    layer = ParallelMamba(16, 8, mixer=partial(AlongRoutes, routes=raster(2)[:1]), state=4)
    torch.nn.init.constant_(layer.scale, 0.3)
    x = torch.randn(2, 16, 5, 3)
    cells = layer.norm(x.permute(0, 2, 3, 1))
    parts = [layer.mamba(part) + 0.3 * part for part in cells.split(4, dim=-1)]
    assert_close(layer(x), layer.proj(layer.norm(torch.cat(parts, dim=-1))).permute(0, 3, 1, 2))


def test_the_spatial_bridge_weighs_cells():
    bridge = SpatialBridge()
    maps = [torch.rand(2, 8, 6, 5) + 1, torch.rand(2, 16, 3, 3) + 1]
    for weighed, x in zip(bridge(maps), maps, strict=True):
        ratio = weighed / x
        assert_close(ratio, ratio[:, :1].expand_as(x))  # one weight for all channels
        assert ratio.min() > 1 and ratio.max() < 2
        assert ratio.std() > 0


def test_the_channel_bridge_weighs_channels_by_those_of_all_maps():
    bridge = ChannelBridge((8, 16))
    maps = [torch.rand(2, 8, 6, 5) + 1, torch.rand(2, 16, 3, 3) + 1]
    before = bridge(maps)
    for weighed, x in zip(before, maps, strict=True):
        ratio = weighed / x
        assert_close(ratio, ratio[..., :1, :1].expand_as(x))  # one weight for all cells
        assert ratio.min() > 1 and ratio.max() < 2
    assert not torch.allclose(bridge([maps[0], maps[1] + 1])[0], before[0])


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="spatial_dims=2; got spatial_dims=3"):
        UltraLightVMUNet(3, 1, 2)
    for widths in ((8, 16, 24, 32, 48), (8, 16, 24, 30, 48, 64), (0, 16, 24, 32, 48, 64)):
        with pytest.raises(ValueError, match=r"six positive multiples of 4; got \("):
            UltraLightVMUNet(2, 1, 2, widths=widths)
    with pytest.raises(ValueError, match="unknown mixer 'mamab'"):
        UltraLightVMUNet(2, 1, 2, mixer="mamab")
