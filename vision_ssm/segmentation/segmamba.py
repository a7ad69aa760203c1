"""SegMamba: Mamba along three orders of a volume, between gated convolutions, under the decoder of UNETR.

Xing et al., "SegMamba: Long-range Sequential Modeling Mamba For 3D Medical Image Segmentation", MICCAI 2024,
arXiv:2401.13560.
"""

# Shapes: b batch, c channels, d h w the volume; an image of two axes has h and w alone.

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers import Norm
from timm.layers import Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.kernels import tri
from vision_ssm.layers.mamba import AlongRoutes, Mamba
from vision_ssm.layers.mixers import Mixer, find_mixer

from .decoder import INSTANCE_NORM, Decoder
from .padding import pad_image, require_channels

__all__ = ["SegMamba"]


class SegMamba(nn.Module):
    """A stem of stride 2, stages of tri-oriented Mamba blocks, weighted skips, UNETR's convolutional decoder.

    What the paper leaves open, and how we read it: a block is what equations 2 and 3 say, a gated convolution, Mamba
    and an MLP of twice the width. The release has two Mambas in the one block of a stage, ``depths=(1, 1, 1, 1),
    mambas=2``, and does not weigh its skips. The stem is no depthwise convolution, whose width the modalities would
    have to divide. The three orders share a Mamba's projections and gate, and have their own convolution, Δ, B, C, A
    and D. The order from slice to slice takes the slices that the map has, so that any size will do. Convolutions are
    followed by instance norm and ReLU. The decoder is UNETR's (arXiv:2103.10504) with residual blocks, the width of its
    coarsest map ``hidden``.

    Args:
        spatial_dims: axes of the image, 3, or 2: there the slices are its rows.
        in_channels: channels of the image, such as 4 modalities.
        out_channels: classes, background included.
        dims: width of each stage; the first is at 1/2, each other halves the map again.
        depths: blocks of each stage.
        mambas: Mambas of each block.
        hidden: width of the coarsest map in the decoder.
        state: size n of the state of each channel.
        mixer: what mixes the cells: "mamba" along the three orders, a name in ``vision_ssm.layers.MIXERS``, or a
            callable mixer(e, state=, rank=) for maps (b, *grid, e). "identity" is the same network without Mamba's
            convolutions and scans.
        deep_supervision: also predict at every coarser stage of the decoder while training.

    Shapes: (b, in_channels, d, h, w) -> (b, out_channels, d, h, w) for any d, h, w >= 1; the image is padded by
    repeating its last cells, and the logits are cropped. With deep supervision, and only while training, a list of such
    logits, finest first; item i has ceil(size / 2**i) cells along an axis.

    Raises:
        ValueError: no channels in or out, an unknown mixer, other spatial_dims, no stage, depths that do not fit the
            stages, or no Mamba in a block; in forward, an image of another shape.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        mambas: int = 1,
        hidden: int = 768,
        state: int = 16,
        mixer: str | Mixer = "mamba",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
        if not dims or len(depths) != len(dims) or min(depths) < 1:
            raise ValueError(f"dims and depths have an entry of at least 1 for each stage; got {dims!r} and {depths!r}")
        if mambas < 1:
            raise ValueError(f"mambas must be at least 1; mixer='identity' is the network without; got {mambas}")
        make_mixer = three_orders(spatial_dims) if mixer == "mamba" else find_mixer(mixer, spatial_dims)
        self.in_channels = in_channels
        self.grad_checkpointing = False
        self.reductions = [[2**level] * spatial_dims for level in range(len(dims) + 1)]

        convolve = partial(Convolution, spatial_dims, bias=True, conv_only=True)
        self.downsample = nn.ModuleList([convolve(in_channels, dims[0], strides=2, kernel_size=7)])
        for before, width in pairwise(dims):
            norm = Norm[Norm.INSTANCE, spatial_dims](before)
            self.downsample.append(nn.Sequential(norm, convolve(before, width, strides=2, kernel_size=2, padding=0)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(spatial_dims, width, mambas, mixer=make_mixer, state=state) for _ in range(depth)))
            for width, depth in zip(dims, depths, strict=True)
        )
        levels = (*dims, hidden)  # widths of the decoder at 1/1, 1/2, ...
        keep = partial(UnetrBasicBlock, spatial_dims, kernel_size=3, stride=1, norm_name=INSTANCE_NORM, res_block=True)
        up = partial(
            UnetrUpBlock,
            spatial_dims,
            kernel_size=3,
            upsample_kernel_size=2,
            norm_name=INSTANCE_NORM,
            res_block=True,
        )
        self.skips = nn.ModuleList(keep(*widths) for widths in zip((in_channels, *dims), levels, strict=True))
        self.decoder = Decoder(
            spatial_dims,
            [up(coarse, width) for width, coarse in pairwise(levels)],
            dims,
            out_channels,
            deep_supervision,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In the encoder, keep the input of each stage for the backward pass, and compute the rest a second time."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        x = pad_image(image, self.in_channels, self.reductions[-1])
        maps = [x]
        for downsample, stage in zip(self.downsample, self.stages):  # noqa: B905 (a script knows no strict=)
            x = downsample(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 (a script compiles a ternary whole)
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            maps.append(weigh_by_certainty(x))
        for level, skip in enumerate(self.skips):
            maps[level] = skip(maps[level])
        return self.decoder(maps, list(image.shape[2:]), self.reductions)


class Block(nn.Module):
    """Gated convolution, Mambas and MLP, each added to the stream (equations 2 and 3); (b, c, *grid) to itself."""

    def __init__(self, spatial_dims: int, dim: int, mambas: int, *, mixer: Mixer, state: int) -> None:
        super().__init__()
        self.convolution = GatedConvolution(spatial_dims, dim)
        self.mambas = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), Mamba(dim, mixer=mixer, state=state)) for _ in range(mambas)
        )
        self.mlp = nn.Sequential(nn.LayerNorm(dim), Mlp(dim, 2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).movedim(1, -1)
        for mamba in self.mambas:
            x = x + mamba(x)
        x = x + self.mlp(x)
        return x.movedim(-1, 1).contiguous()


class GatedConvolution(nn.Module):
    """x + C3(C3(x) · C1(x)), convolutions of 3 and 1 cells (equation 4); (b, c, *grid) to itself."""

    def __init__(self, spatial_dims: int, dim: int) -> None:
        super().__init__()
        convolve = partial(Convolution, spatial_dims, dim, dim, norm=INSTANCE_NORM, act="RELU", bias=False)
        self.around = convolve(kernel_size=3)
        self.gate = convolve(kernel_size=1)
        self.fuse = convolve(kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fuse(self.around(x) * self.gate(x))


def weigh_by_certainty(x: Tensor) -> Tensor:
    """x + x (1 - u), the uncertainty u = -p ln p of p, the sigmoid of the mean of a cell's channels (section 2.3)."""
    mean = x.mean(dim=1, keepdim=True)
    uncertainty = -torch.sigmoid(mean) * F.logsigmoid(mean)
    return x + x * (1 - uncertainty)


def three_orders(spatial_dims: int) -> Mixer:
    """Mamba's convolution and scan slice by slice, the same back, and from slice to slice."""
    return partial(AlongRoutes, routes=tri(spatial_dims))
