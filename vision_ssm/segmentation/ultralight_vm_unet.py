"""UltraLight VM-UNet: a U-Net of 0.049 M parameters, whose coarse levels share one narrow Mamba among four parts.

Wu et al., "UltraLight VM-UNet: Parallel Vision Mamba Significantly Reduces Parameters for Skin Lesion Segmentation",
arXiv:2403.20035. The bridges of the skips are those of Ruan et al., "MALUNet", arXiv:2211.01784.
"""

# Shapes: b batch, c channels, h w the image.

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.layers.mamba import Mamba, ahead
from vision_ssm.layers.mixers import Mixer, find_mixer

from .decoder import Decoder, WithoutSkip
from .padding import pad_image, require_channels
from .vm_unet import require_images

__all__ = ["UltraLightVMUNet"]

PARTS = 4
CONVOLUTIONS = 3
"""How many of the finest levels are convolutions, and not Mamba."""


class UltraLightVMUNet(nn.Module):
    """Six levels: three of convolutions, three of parallel Mamba; the decoder mirrors them.

    What the paper leaves open, and what we read: a level is its layer, a group norm of four groups, pooling (in the
    decoder, bilinear enlarging) and GELU; the sixth level is neither normed nor pooled, so the coarsest map is at 1/32.
    Skips are taken after pooling and are added. The spatial bridge comes first, then the channel bridge, each added to
    its input. The map at 1/2 is enlarged before the logits. The norm before Mamba and the norm after it are one. With
    three channels in and one out this gives 49,457 parameters, the paper's 0.049 M; a norm in the sixth level, or two
    norms around Mamba, would make it 0.050 M. Deep supervision is ours.

    Args:
        spatial_dims: axes of the image; 2.
        in_channels: channels of the image.
        out_channels: classes, background included.
        widths: channels of the six levels, finest first; multiples of 4.
        state: size n of the state of each channel.
        mixer: what mixes the cells inside Mamba: "mamba", row by row, a name in ``vision_ssm.layers.MIXERS``, or a
            callable mixer(e, state=, rank=) for maps (b, h, w, e). "identity" is the same network without Mamba's
            convolution and scan.
        deep_supervision: also predict at every coarser level of the decoder while training, from 1/2 down to 1/32.

    Shapes: (b, in_channels, h, w) -> (b, out_channels, h, w) for any h, w >= 1; the image is padded by repeating its
    last cells, and the logits are cropped. With deep supervision, and only while training, a list of such logits,
    finest first; a level reduced by r has ceil(h / r) rows and ceil(w / r) columns.

    Raises:
        ValueError: no channels in or out, other spatial_dims, widths that are not six multiples of 4, an unknown mixer;
            in forward, an image of another shape.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (8, 16, 24, 32, 48, 64),
        state: int = 16,
        mixer: str | Mixer = "mamba",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        require_images(spatial_dims)
        if len(widths) != 6 or any(width % PARTS or width < PARTS for width in widths):
            raise ValueError(f"widths must be six positive multiples of {PARTS}; got {tuple(widths)}")
        mamba = partial(
            ParallelMamba, mixer=ahead(spatial_dims) if mixer == "mamba" else find_mixer(mixer), state=state
        )
        layers = [convolution] * CONVOLUTIONS + [mamba] * (len(widths) - CONVOLUTIONS)
        self.in_channels = in_channels
        self.grad_checkpointing = False
        self.reductions = [[reduction] * 2 for reduction in (1, 2, 4, 8, 16, 32, 32)]  # of the decoder's maps
        self.encoder = nn.ModuleList(
            nn.Sequential(layer(before, width), nn.GroupNorm(PARTS, width), nn.MaxPool2d(2), nn.GELU())
            for layer, (before, width) in zip(layers[:-1], pairwise((in_channels, *widths[:-1])), strict=True)
        )
        self.deepest = nn.Sequential(layers[-1](*widths[-2:]), nn.GELU())
        self.spatial = SpatialBridge()
        self.channel = ChannelBridge(widths[:-1])
        self.decoder = Decoder(
            spatial_dims,
            [
                WithoutSkip(nn.Upsample(scale_factor=2, mode="bilinear")),
                *(
                    Up(layer(coarse, width), width, scale)
                    for layer, (width, coarse), scale in zip(layers[1:], pairwise(widths), (2, 2, 2, 2, 1), strict=True)
                ),
            ],
            [widths[0], *widths[:-1]],
            out_channels,
            deep_supervision,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In the encoder, keep the input of each level for the backward pass, and compute the rest a second time."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        x = pad_image(image, self.in_channels, self.reductions[-1])
        maps: list[Tensor] = []
        fmap = x
        for stage in self.encoder:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 (a script compiles a ternary whole)
                fmap = checkpoint(stage, fmap)
            else:
                fmap = stage(fmap)
            maps.append(fmap)
        skips = self.channel(self.spatial(maps))
        skips.insert(0, x)
        skips.append(self.deepest(fmap))
        return self.decoder(skips, list(image.shape[2:]), self.reductions)


class Up(nn.Module):
    """A layer on the coarse map, group norm, enlarging and GELU; then the skip is added."""

    def __init__(self, layer: nn.Module, width: int, scale: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            layer, nn.GroupNorm(PARTS, width), nn.Upsample(scale_factor=scale, mode="bilinear"), nn.GELU()
        )

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.layer(coarse) + skip


class ParallelMamba(nn.Module):
    """One Mamba on each quarter of the channels, with a learned multiple of its input added, then a projection.

    Args:
        dim: channels c; a multiple of 4.
        out: channels of the result.
        mixer: of ``Mamba``.
        state: size n of the state of each channel.

    Shapes: (b, c, h, w) -> (b, out, h, w).
    """

    def __init__(self, dim: int, out: int, *, mixer: Mixer, state: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.parts = PARTS
        self.mamba = Mamba(dim // PARTS, mixer=mixer, state=state)
        self.scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        parts = x.unflatten(-1, (self.parts, -1)).movedim(-2, 0)
        batch = parts.flatten(0, 1)  # one after the other in the batch: the weights are the same
        batch = self.mamba(batch) + self.scale * batch
        x = batch.unflatten(0, parts.shape[:2]).movedim(0, -2).flatten(-2)
        return self.proj(self.norm(x)).permute(0, 3, 1, 2)


class SpatialBridge(nn.Module):
    """Weighs the cells of each map by one convolution, shared by all, of its mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=9, dilation=3)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        weighed: list[Tensor] = []
        for x in maps:
            summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
            weighed.append(x + x * self.conv(summary).sigmoid())
        return weighed


class ChannelBridge(nn.Module):
    """Weighs the channels of each map by what the mean of every channel of all maps says."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.weigh = nn.ModuleList(nn.Linear(sum(widths), width) for width in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        means = torch.cat([x.mean((2, 3)) for x in maps], dim=1)
        means = self.conv(means[:, None])[:, 0]
        weighed: list[Tensor] = []
        for level, weigh in enumerate(self.weigh):
            x = maps[level]
            weighed.append(x + x * weigh(means).sigmoid()[:, :, None, None])
        return weighed


def convolution(before: int, width: int) -> nn.Module:
    return nn.Conv2d(before, width, 3, padding=1)
