"""A pyramid of VMamba blocks for volumes, the encoder that timm has not.

The blocks are those of Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166, with routes
along all axes of the map. The network around them is our own: it is unpublished, and has no weights.
"""
# Shapes: b batch, c channels, grid (d, h, w) or (h, w).

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vision_ssm.backbones.hierarchy import drop_path_rates
from vision_ssm.backbones.vmamba import VSSBlock
from vision_ssm.layers import SS
from vision_ssm.layers.mixers import Mixer
from vision_ssm.layers.ss import CONVOLUTIONS, per_axis

__all__ = ["ENCODERS", "SSMEncoder"]

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "ssm3d_nano": {"dims": (16, 32, 64, 96, 128), "depths": (1, 1, 1, 1, 1)},
    "ssm3d_small": {"dims": (32, 64, 128, 256, 320), "depths": (2, 2, 2, 2, 2)},
}
"""Encoders of volumes by name: arguments of ``SSMEncoder``. Each has maps at 1/2, 1/4, ..., 1/32."""

Sizes = tuple[int, ...]


class Levels(NamedTuple):
    """What timm's ``feature_info`` says of the maps of a pyramid; a reduction has a number for each axis."""

    widths: list[int]
    reductions: list[Sizes]

    def channels(self) -> list[int]:
        return self.widths

    def reduction(self) -> list[Sizes]:
        return self.reductions


class EncoderStage(nn.Module):
    """A convolution with strides, norm, and blocks: (b, c, *grid) -> (b, c', *grid'), where sizes round up."""

    def __init__(self, downsample: nn.Module, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.downsample(x).movedim(1, -1))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.movedim(-1, 1)


class SSMEncoder(nn.Module):
    """Stages that each begin with a strided convolution and go on with VMamba blocks; one map of each.

    Args:
        in_channels: channels of the image.
        dims: channels of each stage.
        depths: blocks of each stage; 0 leaves it to the convolution.
        spatial_dims: axes of the image, 2 or 3.
        strides: 1 or 2 for each stage and axis, such as ((1, 2, 2), 2, 2) where slices are thick; 2 by default.
        kernel_sizes: odd widths of the convolutions, for each stage and axis; 3 by default. Along an axis of stride 2
            the first of a stage is 3 wide at least, so that it reads every cell.
        state: size n of the state.
        expand: inner width of SS as a multiple of the stage's.
        mlp_ratio: hidden width of the MLP as a multiple of the stage's; 0 for none.
        gate: SS with gate and convolution bias.
        mixer: what mixes the cells inside SS; a name in ``vision_ssm.layers.MIXERS`` such as "cross", "tri" or
            "hilbert", or "identity" for the same network without the SSM.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_channels, *sizes) -> list of (b, c_i, *ceil(sizes / r_i)) with the reductions r_i that
    ``feature_info.reduction()`` lists; any sizes >= 1.

    Raises:
        ValueError: the arguments do not have an entry for each stage, a stride is not 1 or 2, a kernel is even, or the
            mixer is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        spatial_dims: int = 3,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        state: int = 1,
        expand: float = 1.0,
        mlp_ratio: float = 2.0,
        gate: bool = False,
        mixer: str | Mixer = "cross",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
        given = {"depths": depths, "strides": strides, "kernel_sizes": kernel_sizes}
        if not dims or any(values is not None and len(values) != len(dims) for values in given.values()):
            raise ValueError(f"every stage needs an entry; got {len(dims)} stages, dims={tuple(dims)}, and {given}")
        steps = [per_axis("strides", step, spatial_dims) for step in strides or (2,) * len(dims)]
        kernels = [per_axis("kernel_sizes", kernel, spatial_dims) for kernel in kernel_sizes or (3,) * len(dims)]
        if max(map(max, steps)) > 2:
            raise ValueError(f"strides must be 1 or 2 along each axis; got {strides}")

        make_mixer = partial(
            SS, spatial_dims=spatial_dims, state=state, expand=expand, mixer=mixer, gate=gate, conv_bias=gate
        )
        rates = drop_path_rates(depths, drop_path_rate)
        self.in_channels = in_channels
        self.feature_info = Levels(list(dims), list(accumulate(steps, _times)))
        self.stages = nn.ModuleList()
        for (before, dim), depth, step, kernel in zip(
            pairwise((in_channels, *dims)), depths, steps, kernels, strict=True
        ):
            block: Callable[..., nn.Module] = partial(
                VSSBlock, dim, make_mixer=partial(make_mixer, kernel_size=kernel), mlp_ratio=mlp_ratio
            )
            blocks = [block(drop_path=next(rates)) for _ in range(depth)]
            self.stages.append(EncoderStage(_downsample(before, dim, kernel, step), dim, blocks))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block for the backward pass, and compute the rest a second time."""
        for stage in self.modules():
            if isinstance(stage, EncoderStage):
                stage.grad_checkpointing = enable

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.maps(image)

    def maps(self, image: Tensor) -> list[Tensor]:
        """The map of each stage; a script of a subclass cannot ask its ``super()``."""
        maps: list[Tensor] = []
        x = image
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _times(reduction: Sizes, step: Sizes) -> Sizes:
    return tuple(before * now for before, now in zip(reduction, step, strict=True))


def _downsample(dim: int, out: int, kernel: Sizes, step: Sizes) -> nn.Module:
    sizes = tuple(max(size, 2 * stride - 1) for size, stride in zip(kernel, step, strict=True))
    padding = tuple(size // 2 for size in sizes)
    return CONVOLUTIONS[len(kernel)](dim, out, sizes, stride=step, padding=padding)
