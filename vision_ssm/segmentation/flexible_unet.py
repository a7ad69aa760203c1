"""VMamba as an encoder of MONAI's FlexibleUNet; importing this module registers it with MONAI.

FlexibleUNet wants maps at 1/2, 1/4, ..., 1/32 of the image. VMamba's convolution stem has one at 1/2, between its two
convolutions, and pretrained as all others are. Models with a patch stem begin at 1/4 and are not registered; SSMUNet
takes those.
"""
# Shapes: b batch, c channels, h w the image.

from functools import cache
from typing import Any

import timm
import torch
from monai.networks.blocks import BaseEncoder
from monai.networks.nets import FLEXUNET_BACKBONE
from torch import Tensor, nn

__all__ = ["VMambaEncoder"]

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
        height, width = x.shape[-2:]
        if min(height, width) < SMALLEST:
            raise ValueError(f"images need at least {SMALLEST} x {SMALLEST} pixels; got {height} x {width}. Pad them")
        half = self.stem[: self.second](x)
        maps = [half, self.stages[0](self.stem[self.second :](half))]
        for stage in self.stages[1:]:
            maps.append(stage(maps[-1]))
        return [fmap[..., : height // 2**level, : width // 2**level] for level, fmap in enumerate(maps, start=1)]

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


FLEXUNET_BACKBONE.register_class(VMambaEncoder)
