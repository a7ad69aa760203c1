"""SSMUNet: the U-Net decoder of MONAI on the feature pyramid of a timm backbone.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597; the blocks are
those of UNETR (arXiv:2103.10504). Nothing here knows a state-space model: ``feature_info`` is all that is read of the
backbone, so a convolutional or an identity-mixer encoder gives the control experiment with the same decoder.
"""
# Shapes: b batch, c channels, h w the image, r the reduction of a level (1 is full resolution).

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch.nn.functional as F
from monai.networks.blocks import Convolution, UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

__all__ = ["SSMUNet"]

INSTANCE_NORM = ("instance", {"affine": True})


class SSMUNet(nn.Module):
    """U-Net with a timm backbone as encoder.

    Levels that are finer than the backbone's first map (1/1 and 1/2 for a stem of stride 4) come from small
    convolution blocks on the image. Inputs of any size are padded to a multiple of the coarsest reduction by repeating
    the last row and column, and the logits are cropped back.

    Args:
        backbone: name of a timm model that supports ``features_only``.
        in_channels: channels of the image; 2.5-D input has one channel per slice.
        out_channels: classes, background included.
        out_indices: which of the backbone's maps are used; all by default. They must double in reduction.
        decoder_channels: widths of the decoder from full resolution down to one level above the coarsest map;
            16, 32, 64, ... up to 256 by default.
        deep_supervision: also predict at every coarser decoder level while training.
        **backbone_arguments: passed whole to ``timm.create_model``, e.g. ``mixer="identity"`` or ``pretrained=True``.

    Raises:
        ValueError: the backbone is unknown, its maps do not double in reduction, or the widths do not fit its levels.

    Shapes: (b, in_channels, h, w) -> (b, out_channels, h, w) for any h, w >= 1. With deep supervision, and only while
    training, a list of such logits, finest first; item i has ceil(h / 2**i) rows and ceil(w / 2**i) columns.
    """

    def __init__(
        self,
        backbone: str,
        *,
        in_channels: int,
        out_channels: int,
        out_indices: Sequence[int] | None = None,
        decoder_channels: Sequence[int] | None = None,
        deep_supervision: bool = False,
        **backbone_arguments: Any,
    ) -> None:
        super().__init__()
        if out_indices is not None:
            backbone_arguments["out_indices"] = tuple(out_indices)
        self.encoder = create_encoder(backbone, in_chans=in_channels, **backbone_arguments)
        info: Any = self.encoder.feature_info
        reductions, channels = info.reduction(), info.channels()
        missing = missing_levels(backbone, reductions)
        self.multiple = reductions[-1]
        self.deep_supervision = deep_supervision

        levels = missing + len(reductions) - 1
        widths = tuple(decoder_channels or (min(16 * 2**level, 256) for level in range(levels)))
        if len(widths) != levels:
            raise ValueError(
                f"{backbone} with reductions {reductions} has {levels} decoder levels (full resolution down to "
                f"1/{reductions[-1] // 2}); got {len(widths)} decoder_channels {widths}"
            )
        self.image_levels = image_levels(in_channels, widths[:missing])
        self.lateral = nn.ModuleList(lateral(*pair) for pair in zip(channels[:-1], widths[missing:], strict=True))
        self.up = nn.ModuleList(up(*pair) for pair in zip((*widths[1:], channels[-1]), widths, strict=True))
        self.heads = nn.ModuleList(
            nn.Conv2d(width, out_channels, kernel_size=1) for width in (widths if deep_supervision else widths[:1])
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        height, width = image.shape[-2:]
        maps = self.decode(pad_to_multiple(image, self.multiple))
        if not (self.deep_supervision and self.training):
            return self.heads[0](maps[0])[..., :height, :width]
        return [
            head(fmap)[..., : -(-height // 2**level), : -(-width // 2**level)]
            for level, (head, fmap) in enumerate(zip(self.heads, maps, strict=True))
        ]

    def decode(self, image: Tensor) -> list[Tensor]:
        """Maps of the decoder, finest first; h and w must be multiples of the coarsest reduction."""
        skips = []
        fine = image
        for block in self.image_levels:
            fine = block(fine)
            skips.append(fine)
        *laterals, coarse = self.encoder(image)
        skips += [block(fmap) for block, fmap in zip(self.lateral, laterals, strict=True)]

        maps = []
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            coarse = block(coarse, skip)
            maps.append(coarse)
        return maps[::-1]


def create_encoder(backbone: str, **arguments: Any) -> nn.Module:
    """The backbone as a pyramid of maps (b, c, h / r, w / r).

    Raises:
        ValueError: timm knows no such model, or the model gives maps in another layout.
    """
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=5) or timm.list_models("*vmamba*")
        raise ValueError(
            f"unknown backbone {backbone!r}; did you mean {', '.join(close)}? timm.list_models() lists all"
        )
    encoder = timm.create_model(backbone, features_only=True, **arguments)
    if encoder.output_fmt != "NCHW":
        encoder = ChannelsFirst(encoder)
    return encoder


class ChannelsFirst(nn.Module):
    """A pyramid whose maps come as (b, h, w, c), turned to (b, c, h, w)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_info = encoder.feature_info

    def forward(self, image: Tensor) -> list[Tensor]:
        return [fmap.permute(0, 3, 1, 2).contiguous() for fmap in self.encoder(image)]


def missing_levels(backbone: str, reductions: Sequence[int]) -> int:
    """How many levels lie above the backbone's first map: 2 for a stem of stride 4.

    Raises:
        ValueError: the first reduction is no power of two, a later one is not twice the one before, or there is no
            level to decode.
    """
    first = reductions[0]
    if list(reductions) != [first * 2**i for i in range(len(reductions))] or first & (first - 1):
        raise ValueError(
            f"the maps of {backbone} are reduced by {list(reductions)}; a U-Net needs a power of two that doubles from "
            "map to map, such as [4, 8, 16, 32]. Choose maps with out_indices, or another backbone"
        )
    if reductions[-1] == 1:
        raise ValueError(f"{backbone} gives one map at full resolution, so there is nothing to decode; use more maps")
    return first.bit_length() - 1


def image_levels(in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """Convolution blocks for the levels 1/1, 1/2, ... that the backbone lacks; each halves the one before."""
    return nn.ModuleList(
        UnetrBasicBlock(2, before, width, kernel_size=3, stride=1 if level == 0 else 2, norm_name=INSTANCE_NORM)
        for level, (before, width) in enumerate(pairwise((in_channels, *widths)))
    )


def lateral(channels: int, width: int) -> nn.Module:
    """Projects a map of the backbone to the decoder's width."""
    return Convolution(2, channels, width, kernel_size=1, norm=INSTANCE_NORM, act="LEAKYRELU")


def up(channels: int, width: int) -> nn.Module:
    """Doubles the resolution, joins the skip of the same width, convolves twice."""
    return UnetrUpBlock(2, channels, width, kernel_size=3, upsample_kernel_size=2, norm_name=INSTANCE_NORM)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column until h and w are multiples of ``multiple``."""
    rows, columns = (-size % multiple for size in image.shape[-2:])
    return F.pad(image, (0, columns, 0, rows), mode="replicate") if rows or columns else image
