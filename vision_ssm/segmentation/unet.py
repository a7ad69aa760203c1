"""SSMUNet: a U-Net decoder of MONAI's blocks on the feature pyramid of an encoder, for images and volumes.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597; the blocks are
those of UNETR (arXiv:2103.10504). Nothing here knows a state-space model: ``feature_info`` is all that is read of the
encoder, so a convolutional or an identity-mixer encoder gives the control experiment with the same decoder.
"""
# Shapes: b batch, c channels, sizes those of the image, r the reductions of a level, one for each axis.

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
from monai.networks.blocks import Convolution, UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from vision_ssm.segmentation.decoder import INSTANCE_NORM
from vision_ssm.segmentation.encoder import ENCODERS, SSMEncoder
from vision_ssm.segmentation.padding import crop_map, pad_image, require_channels

__all__ = ["SSMUNet"]

Sizes = tuple[int, ...]


class SSMUNet(nn.Module):
    """U-Net on a timm backbone for images, and on our own encoder for volumes.

    Levels that are finer than the encoder's first map (1/1, and 1/2 for a stem of stride 4) come from small convolution
    blocks on the image. Inputs of any size are padded to a multiple of the coarsest reduction by repeating the last
    cells of each axis, and the logits are cropped back.

    Args:
        backbone: for images, the name of a timm model that supports ``features_only``; for volumes, a name in
            ``vision_ssm.segmentation.encoder.ENCODERS`` such as "ssm3d_small".
        spatial_dims: 2 for images, 3 for volumes.
        in_channels: channels of the image; 2.5-D input has one channel per slice.
        out_channels: classes, background included.
        out_indices: which of a timm backbone's maps are used; all by default. They must double in reduction.
        decoder_channels: widths of the decoder from full resolution down to one level above the coarsest map;
            16, 32, 64, ... up to 256 by default.
        deep_supervision: also predict at every coarser decoder level while training.
        **backbone_arguments: passed whole to ``timm.create_model`` or ``SSMEncoder``, e.g. ``mixer="identity"``,
            ``pretrained=True`` for a timm backbone, ``strides=((1, 2, 2), 2, 2, 2, 2)`` for volumes of thick slices.

    Raises:
        ValueError: no channels in or out, the backbone is unknown, its maps do not double in reduction, or the widths
            do not fit its levels; in forward, an image of other axes or channels, or without cells.

    Shapes: (b, in_channels, *sizes) -> (b, out_channels, *sizes) for any sizes >= 1. With deep supervision, and only
    while training, a list of such logits, finest first; for an image, item i has ceil(h / 2**i) rows and
    ceil(w / 2**i) columns, for a volume the sizes are divided by the reductions of its levels.
    """

    def __init__(
        self,
        backbone: str,
        *,
        spatial_dims: int = 2,
        in_channels: int,
        out_channels: int,
        out_indices: Sequence[int] | None = None,
        decoder_channels: Sequence[int] | None = None,
        deep_supervision: bool = False,
        **backbone_arguments: Any,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        if out_indices is not None:
            if not out_indices:
                raise ValueError("out_indices must name at least one map of the backbone; leave it out for all maps")
            backbone_arguments["out_indices"] = tuple(out_indices)
        self.encoder = create_encoder(backbone, spatial_dims, in_channels, **backbone_arguments)
        info: Any = self.encoder.feature_info
        reductions, channels = info.reduction(), info.channels()
        self.in_channels = in_channels
        self.reductions = [list(sizes) for sizes in levels(backbone, reductions, spatial_dims)]
        self.deep_supervision = deep_supervision

        count = len(self.reductions) - 1
        missing = len(self.reductions) - len(reductions)
        widths = tuple(decoder_channels or (min(16 * 2**level, 256) for level in range(count)))
        if len(widths) != count:
            raise ValueError(
                f"{backbone} with reductions {reductions} has {count} decoder levels (full resolution down to the one "
                f"above the coarsest map); got {len(widths)} decoder_channels {widths}"
            )
        self.channels = [*widths, channels[-1]]  # of the map at each of the reductions
        steps = [tuple(below // here for here, below in zip(*pair, strict=True)) for pair in pairwise(self.reductions)]
        self.image_levels = nn.ModuleList(
            UnetrBasicBlock(spatial_dims, *pair, kernel_size=3, stride=step, norm_name=INSTANCE_NORM)
            for pair, step in zip(
                pairwise((in_channels, *widths[:missing])), [(1,) * spatial_dims, *steps][:missing], strict=True
            )
        )
        self.lateral = nn.ModuleList(
            Convolution(spatial_dims, *pair, kernel_size=1, norm=INSTANCE_NORM, act="LEAKYRELU")
            for pair in zip(channels[:-1], widths[missing:], strict=True)
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(spatial_dims, *pair, kernel_size=3, upsample_kernel_size=step, norm_name=INSTANCE_NORM)
            for pair, step in zip(zip((*widths[1:], channels[-1]), widths, strict=True), steps, strict=True)
        )
        convolution: Any = Conv[Conv.CONV, spatial_dims]
        self.heads = nn.ModuleList(
            convolution(width, out_channels, kernel_size=1) for width in (widths if deep_supervision else widths[:1])
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In the encoder, keep few maps for the backward pass, and compute the others a second time."""
        encoder: Any = self.encoder
        encoder.set_grad_checkpointing(enable)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        return self.predict(self.encode(image), list(image.shape[2:]))

    def encode(self, image: Tensor) -> list[Tensor]:
        """Maps (b, c, *sizes / r) of all levels of the padded image, finest first: the skips and the coarsest map."""
        image = pad_image(image, self.in_channels, self.reductions[-1], least=1)
        maps: list[Tensor] = []
        fine = image
        for block in self.image_levels:
            fine = block(fine)
            maps.append(fine)
        pyramid = self.encoder(image)
        for i, block in enumerate(self.lateral):
            maps.append(block(pyramid[i]))
        maps.append(pyramid[-1])
        return maps

    def predict(self, maps: list[Tensor], sizes: list[int]) -> Tensor | list[Tensor]:
        """Logits from what ``encode`` returns, for an image of these sizes."""
        coarse = maps[-1]
        decoded: list[Tensor] = []
        for level, _ in enumerate(self.up, start=2):
            for i, block in enumerate(self.up, start=level):  # backwards: a script walks modules forwards only
                if i == len(self.up) + 1:
                    coarse = block(coarse, maps[-level])
                    decoded.append(coarse)
        if not (self.deep_supervision and self.training):
            return crop_map(self.heads[0](coarse), sizes, self.reductions[0])
        return [crop_map(head(decoded[-1 - i]), sizes, self.reductions[i]) for i, head in enumerate(self.heads)]


def create_encoder(backbone: str, spatial_dims: int, in_channels: int, **arguments: Any) -> nn.Module:
    """The backbone as a pyramid of maps (b, c, *sizes / r).

    Raises:
        ValueError: there is no such backbone for so many axes.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 (images) or 3 (volumes); got {spatial_dims}")
    if spatial_dims == 3:
        if backbone not in ENCODERS:
            raise ValueError(
                f"unknown backbone of volumes {backbone!r}; there are {', '.join(ENCODERS)}. timm's are for images, "
                "spatial_dims=2"
            )
        return SSMEncoder(in_channels, **{**ENCODERS[backbone], **arguments})
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=5) or timm.list_models("*vmamba*")
        raise ValueError(
            f"unknown backbone {backbone!r}; did you mean {', '.join(close)}? timm.list_models() lists all; "
            f"volumes, spatial_dims=3, take {', '.join(ENCODERS)}"
        )
    encoder = timm.create_model(backbone, features_only=True, in_chans=in_channels, **arguments)
    if encoder.output_fmt != "NCHW":
        encoder = ChannelsFirst(encoder)
    return encoder


class ChannelsFirst(nn.Module):
    """A pyramid whose maps come as (b, h, w, c), turned to (b, c, h, w)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_info = encoder.feature_info

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        encoder: Any = self.encoder
        encoder.set_grad_checkpointing(enable)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [fmap.permute(0, 3, 1, 2).contiguous() for fmap in self.encoder(image)]


def levels(backbone: str, reductions: Sequence[int | Sizes], spatial_dims: int) -> list[Sizes]:
    """Reductions along each axis of all levels of a U-Net, from full resolution to the backbone's coarsest map.

    Raises:
        ValueError: a reduction is no power of two, a map is not twice as coarse as the one before it along some axis
            and at most twice along all, or there is no level to decode.
    """
    maps = [(size,) * spatial_dims if isinstance(size, int) else tuple(size) for size in reductions]
    ratios = [[below / here for here, below in zip(*pair, strict=True)] for pair in pairwise(maps)]
    if any(size & (size - 1) for size in maps[0]) or any({*ratio} not in ({2}, {1, 2}) for ratio in ratios):
        raise ValueError(
            f"the maps of {backbone} are reduced by {list(reductions)}; a U-Net needs powers of two that double from "
            "map to map along some axis, such as [4, 8, 16, 32]. Choose maps with out_indices, or another backbone"
        )
    if max(maps[-1]) == 1:
        raise ValueError(f"{backbone} gives one map at full resolution, so there is nothing to decode; use more maps")
    missing = max(maps[0]).bit_length() - 1
    return [tuple(min(2**level, size) for size in maps[0]) for level in range(missing)] + maps
