"""Encoders of MONAI's FlexibleUNet, for images and volumes; importing this module registers them with MONAI.

FlexibleUNet wants maps at 1/2, 1/4, ..., 1/32 of the image, which our encoders of volumes have. VMamba's convolution
stem has one at 1/2, between its two convolutions, and pretrained as all others are. Models with a patch stem begin at
1/4 and are not registered; SSMUNet takes those.
"""
# Shapes: b batch, c channels, (d) h w the image.

from functools import cache
from typing import Any

import timm
import torch
from monai.networks.blocks import BaseEncoder
from monai.networks.nets import FLEXUNET_BACKBONE
from torch import Tensor, nn

from vision_ssm.segmentation.encoder import ENCODERS, SSMEncoder

__all__ = ["VMambaEncoder", "VolumeEncoder"]

SMALLEST = 32


class VMambaEncoder(nn.Module, BaseEncoder):
    """Five maps of a VMamba, each half as large as the one before, the first half as large as the image.

    The backbone's maps round odd sizes up. Their last row or column is then left out, since the padding of FlexibleUNet
    expects sizes that are rounded down.

    Args:
        spatial_dims: 2.
        in_channels: channels of the image.
        pretrained: load timm's pretrained weights; the first convolution is adapted to ``in_channels``.
        backbone: timm name of a VMamba with a convolution stem; ``get_encoder_names()`` lists them.

    Raises:
        ValueError: another ``spatial_dims`` or backbone; in forward, an image of less than 32 pixels along a side.
        RuntimeError: ``pretrained``, and there are no weights for this backbone.

    Shapes: (b, in_channels, h, w) -> list of (b, c_i, h // 2**(i + 1), w // 2**(i + 1)), any h, w >= 32.
    """

    def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool, backbone: str) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"{backbone} is a network for images, spatial_dims=2; got spatial_dims={spatial_dims}")
        if backbone not in widths():
            raise ValueError(f"unknown backbone {backbone!r}; those with a map at 1/2 are {', '.join(widths())}")
        model: Any = timm.create_model(backbone, pretrained=pretrained, in_chans=in_channels)
        self.stem, self.stages = model.stem, model.stages  # the state dict has timm's names
        self.second = convolutions(model.stem)[1]

    def forward(self, x: Tensor) -> list[Tensor]:
        sizes = list(x.shape[2:])
        if not torch.jit.is_scripting():
            check_smallest(x)
        maps: list[Tensor] = []
        for place, layer in enumerate(self.stem):
            if place == self.second:
                maps.append(x)
            x = layer(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return halved(maps, sizes)

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        return list(widths())

    @classmethod
    def num_channels_per_output(cls) -> list[tuple[int, ...]]:
        return list(widths().values())

    @classmethod
    def num_outputs(cls) -> list[int]:
        return [len(channels) for channels in widths().values()]

    @classmethod
    def get_encoder_parameters(cls) -> list[dict[str, Any]]:
        """What builds each encoder; new dictionaries in every call, since FlexibleUNet writes into them."""
        return [
            {"spatial_dims": 2, "in_channels": 3, "pretrained": False, "backbone": backbone} for backbone in widths()
        ]


@cache
def widths() -> dict[str, tuple[int, ...]]:
    """Channels of the five maps of every VMamba that has one at 1/2, read from networks without blocks and storage."""
    models: dict[str, Any]
    with torch.device("meta"):
        models = {name: timm.create_model(name, depths=(0, 0, 0, 0)) for name in timm.list_models(module="vmamba")}
    return {
        name: (model.stem[second[0]].in_channels, *(stage["num_chs"] for stage in model.feature_info))
        for name, model in models.items()
        if (second := convolutions(model.stem)[1:])
    }


def convolutions(stem: nn.Sequential) -> list[int]:
    """Places of the convolutions in a stem. Each halves the map where there are two; a single one makes patches."""
    return [place for place, module in enumerate(stem) if isinstance(module, nn.Conv2d)]


class VolumeEncoder(SSMEncoder, BaseEncoder):
    """Five maps of a volume, each half as large as the one before, odd sizes rounded down; see ``VMambaEncoder``.

    Args:
        spatial_dims: 3.
        in_channels: channels of the volume.
        pretrained: False; there are no weights.
        backbone: a name in ``vision_ssm.segmentation.encoder.ENCODERS``.

    Raises:
        ValueError: another ``spatial_dims`` or backbone; in forward, a volume of less than 32 voxels along a side.
        RuntimeError: ``pretrained``.

    Shapes: (b, in_channels, d, h, w) -> list of (b, c_i, d // 2**(i + 1), h // 2**(i + 1), w // 2**(i + 1)).
    """

    def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool, backbone: str) -> None:
        if spatial_dims != 3:
            raise ValueError(f"{backbone} is a network for volumes, spatial_dims=3; got spatial_dims={spatial_dims}")
        if backbone not in ENCODERS:
            raise ValueError(f"unknown backbone of volumes {backbone!r}; there are {', '.join(ENCODERS)}")
        if pretrained:
            raise RuntimeError(f"No pretrained weights exist for {backbone}; set pretrained=False")
        super().__init__(in_channels, **ENCODERS[backbone])

    def forward(self, x: Tensor) -> list[Tensor]:
        if not torch.jit.is_scripting():
            check_smallest(x)
        return halved(self.maps(x), list(x.shape[2:]))

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        return list(ENCODERS)

    @classmethod
    def num_channels_per_output(cls) -> list[tuple[int, ...]]:
        return [tuple(arguments["dims"]) for arguments in ENCODERS.values()]

    @classmethod
    def num_outputs(cls) -> list[int]:
        return [len(channels) for channels in cls.num_channels_per_output()]

    @classmethod
    def get_encoder_parameters(cls) -> list[dict[str, Any]]:
        """What builds each encoder; new dictionaries in every call, since FlexibleUNet writes into them."""
        return [{"spatial_dims": 3, "in_channels": 1, "pretrained": False, "backbone": name} for name in ENCODERS]


def check_smallest(image: Tensor) -> None:
    """Raises ValueError where the coarsest of five maps would have no cell, which FlexibleUNet rounds down to."""
    sizes = list(image.shape[2:])
    if min(sizes) < SMALLEST:
        axes = " x ".join([str(SMALLEST)] * len(sizes))
        raise ValueError(f"images need at least {axes} cells; got {' x '.join(map(str, sizes))}. Pad them")


def halved(maps: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The maps at 1/2, 1/4, ... of an image of these sizes, without the cells by which they are rounded up."""
    for level, fmap in enumerate(maps):
        sizes = [size // 2 for size in sizes]
        for axis, size in enumerate(sizes):
            fmap = fmap.narrow(axis + 2, 0, size)
        maps[level] = fmap
    return maps


FLEXUNET_BACKBONE.register_class(VMambaEncoder)
FLEXUNET_BACKBONE.register_class(VolumeEncoder)
