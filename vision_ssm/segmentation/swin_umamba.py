"""Swin-UMamba: a U-Net with VMamba's stages as encoder and residual convolutions as decoder.

Liu et al., "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", MICCAI 2024, arXiv:2402.03302.
"""

# Shapes: b batch, c channels, h w the image.

from itertools import pairwise
from os import PathLike
from typing import Any

import timm
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from vision_ssm.backbones.hierarchy import Stage, norm2d
from vision_ssm.backbones.pretrained import create_pretrained
from vision_ssm.layers.mixers import Mixer

from .decoder import INSTANCE_NORM, Decoder
from .padding import pad_image, require_channels
from .vm_unet import require_images, require_vmamba

__all__ = ["SwinUMamba"]


class SwinUMamba(nn.Module):
    """Stem of stride 2, patch embedding of stride 2, VMamba's stages, and a residual decoder from 1/16 to 1/1.

    This is the network with the convolutional decoder; the paper's smaller one, with Mamba in the decoder, is not here.
    What the paper leaves open, and what we read: a map enters its skip as it leaves its stage, without a norm. The
    residual block of each skip takes the map to the decoder's width at that level, which is the width of the next
    coarser map. Every level of the decoder has a head, the map at 1/32 has none.

    Args:
        spatial_dims: axes of the image; 2.
        in_channels: channels of the image.
        out_channels: classes, background included.
        backbone: timm name of the VMamba whose stages are the encoder.
        stem_channels: channels of the stem's map, and of the decoder's at full resolution.
        pretrained: True for timm's weights of the backbone, a file of such weights, or False. They fill all blocks and
            all patch merging. Stem, patch embedding and decoder have no counterpart and begin at random.
        mixer: what mixes the cells inside a block: a name in ``vision_ssm.layers.MIXERS`` or a callable; "identity" is
            the same network without the SSM.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.
        deep_supervision: also predict at 1/2, 1/4, 1/8 and 1/16 while training.

    Shapes: (b, in_channels, h, w) -> (b, out_channels, h, w) for any h, w >= 1; the image is padded by repeating its
    last cells, and the logits are cropped. With deep supervision, and only while training, a list of such logits,
    finest first; a level reduced by r has ceil(h / r) rows and ceil(w / r) columns.

    Raises:
        ValueError: no channels in or out, other spatial_dims, a backbone that is no VMamba, an unknown mixer, a file
            that cannot be read; in forward, an image of another shape.
        FileNotFoundError: no such file.
        RuntimeError: the weights do not exist, or do not fit the backbone.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        backbone: str = "vmamba_tiny_v0",
        stem_channels: int = 48,
        pretrained: bool | str | PathLike[str] = False,
        mixer: str | Mixer = "cross",
        drop_path_rate: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        require_images(spatial_dims)
        require_vmamba(backbone)
        encoder: Any
        if pretrained is False:
            encoder = timm.create_model(backbone, num_classes=0, mixer=mixer, drop_path_rate=drop_path_rate)
        else:  # in_chans, since timm compares those of a file too
            encoder = create_pretrained(
                backbone, pretrained, in_chans=in_channels, mixer=mixer, drop_path_rate=drop_path_rate
            )
        dims = [stage["num_chs"] for stage in encoder.feature_info]
        self.in_channels = in_channels
        self.reductions = [[reduction] * 2 for reduction in (1, 2, 4, 8, 16, 32)]  # of the decoder's maps
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem_channels, 7, stride=2, padding=3), nn.InstanceNorm2d(stem_channels, affine=True)
        )
        self.patch_embed = nn.Sequential(nn.Conv2d(stem_channels, dims[0], 2, stride=2), norm2d(dims[0]))
        self.stages = encoder.stages  # the state dict has timm's names

        widths = (stem_channels, *dims)  # of the decoder, from full resolution to 1/16
        self.skips = nn.ModuleList(
            UnetrBasicBlock(2, before, width, 3, stride=1, norm_name=INSTANCE_NORM, res_block=True)
            for before, width in pairwise((in_channels, *widths))
        )
        self.decoder = Decoder(
            spatial_dims,
            [
                UnetrUpBlock(2, coarse, width, 3, upsample_kernel_size=2, norm_name=INSTANCE_NORM, res_block=True)
                for width, coarse in zip(widths, (*dims, dims[-1]), strict=True)
            ],
            widths,
            out_channels,
            deep_supervision,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In the encoder, keep the input of each block for the backward pass, and compute the rest a second time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        x = pad_image(image, self.in_channels, self.reductions[-1])
        half = self.stem(x)
        maps = [x, half]
        x = self.patch_embed(half)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        for i, skip in enumerate(self.skips):
            maps[i] = skip(maps[i])
        return self.decoder(maps, list(image.shape[2:]), self.reductions)
