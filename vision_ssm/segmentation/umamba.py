"""U-Mamba: nnU-Net's residual U-Net with Mamba on the cells of its maps.

Ma, Li and Wang, "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", 2024, arXiv:2401.04722.
"""

# Shapes: b batch, c channels, d h w the image; an image of two axes has h and w alone.

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from monai.networks.blocks import UnetResBlock
from monai.networks.blocks.dynunet_block import get_conv_layer
from monai.networks.nets import DynUNet
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.layers.mamba import Mamba, ahead
from vision_ssm.layers.mixers import Mixer, find_mixer

from .decoder import INSTANCE_NORM, Decoder
from .padding import pad_image, require_channels

__all__ = ["UMamba"]

PerStage = int | Sequence[int | Sequence[int]]

FORMS = {"bottleneck": slice(-1, None), "encoder": slice(None)}
"""The stages of the encoder that end with Mamba, by the form of the network."""


class UMamba(nn.Module):
    """U-Net of residual blocks; Mamba ends the coarsest stage of the encoder, or every stage of it.

    What the paper leaves open, and how we read it: both halves have two residual blocks a stage. Nothing is added
    around LayerNorm and Mamba, as in the paper's figure. Cells are read row by row, whatever the number of axes. Mamba
    always mixes the cells of a map, so no weight depends on the size of a patch. Convolutions begin as nnU-Net's.

    Args:
        spatial_dims: axes of the image, 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included.
        form: where Mamba is: "bottleneck" or "encoder".
        channels: width of each stage, finest first; by default nnU-Net's for six stages, from 32 doubling up to 512 in
            2-D and to 320 in 3-D.
        strides: what each stage reduces its input by, 1 or 2 along each axis; by default 1 in the first stage, then 2.
        kernel_sizes: odd sides of the convolutions of each stage.
        blocks: residual blocks of each stage of the encoder.
        decoder_blocks: residual blocks of each stage of the decoder, finest first.
        state: size n of the state of each channel.
        mixer: what mixes the cells: "mamba", a name in ``vision_ssm.layers.MIXERS``, or a callable mixer(e, state=,
            rank=) for maps (b, *grid, e). "identity" is the same network without Mamba's convolution and scan.
        deep_supervision: also predict at every coarser stage of the decoder while training.

    ``strides``, ``kernel_sizes``, ``blocks`` and ``decoder_blocks`` take one value for all stages or one for each; a
    stage's stride and kernel take one value for all axes or one for each. nnU-Net plans them so.

    Shapes: (b, in_channels, d, h, w) -> (b, out_channels, d, h, w) for any d, h, w >= 1; the image is padded by
    repeating its last cells, and the logits are cropped. With deep supervision, and only while training, a list of such
    logits, finest first; a level reduced by r has ceil(size / r) cells along an axis.

    Raises:
        ValueError: no channels in or out, an unknown form or mixer, other spatial_dims, fewer than two stages, values
            that do not fit the stages or the axes, strides other than 1 and 2, even kernels; in forward, an image of
            another shape.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        form: str = "bottleneck",
        channels: Sequence[int] | None = None,
        strides: PerStage | None = None,
        kernel_sizes: PerStage = 3,
        blocks: int | Sequence[int] = 2,
        decoder_blocks: int | Sequence[int] = 2,
        state: int = 16,
        mixer: str | Mixer = "mamba",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; the forms are {', '.join(FORMS)}")
        if channels is None:
            channels = [min(32 * 2**stage, 512 if spatial_dims == 2 else 320) for stage in range(6)]
        stages = len(channels)
        if stages < 2:
            raise ValueError(f"a U-Net has at least two stages; got channels={channels!r}")
        steps = per_stage("strides", (1, *[2] * (stages - 1)) if strides is None else strides, stages, spatial_dims)
        sides = per_stage("kernel_sizes", kernel_sizes, stages, spatial_dims)
        if max(steps[0]) > 1 or not {step for stage in steps for step in stage} <= {1, 2}:
            raise ValueError(f"strides must be 1 in the first stage and 1 or 2 in the others; got {strides!r}")
        if not all(side % 2 for stage in sides for side in stage):
            raise ValueError(f"kernel_sizes must be odd, for a kernel to have a centre; got {kernel_sizes!r}")
        counts = per_stage("blocks", blocks, stages, 1)
        decoder_counts = per_stage("decoder_blocks", decoder_blocks, stages - 1, 1)

        self.in_channels = in_channels
        self.grad_checkpointing = False
        self.reductions = [[1] * spatial_dims]
        for step in steps[1:]:
            self.reductions.append([before * now for before, now in zip(self.reductions[-1], step, strict=True)])
        make_mixer = ahead(spatial_dims) if mixer == "mamba" else find_mixer(mixer, spatial_dims)
        residual = partial(residual_blocks, spatial_dims)
        encoder = [
            residual(*widths, side, step, count)
            for widths, side, step, (count,) in zip(
                pairwise((in_channels, *channels)), sides, steps, counts, strict=True
            )
        ]
        for stage in range(stages)[FORMS[form]]:
            encoder[stage].append(CellMixer(channels[stage], mixer=make_mixer, state=state))
        self.encoder = nn.ModuleList(encoder)
        self.decoder = Decoder(
            spatial_dims,
            [
                Up(enlarge(spatial_dims, coarse, width, step), residual(2 * width, width, side, 1, count))
                for (width, coarse), side, step, (count,) in zip(
                    pairwise(channels), sides[:-1], steps[1:], decoder_counts, strict=True
                )
            ],
            channels[:-1],
            out_channels,
            deep_supervision,
        )
        self.apply(DynUNet.initialize_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In the encoder, keep the input of each stage for the backward pass, and compute the rest a second time."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        x = pad_image(image, self.in_channels, self.reductions[-1])
        maps: list[Tensor] = []
        for stage in self.encoder:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 (a script compiles a ternary whole)
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            maps.append(x)
        return self.decoder(maps, list(image.shape[2:]), self.reductions)


class CellMixer(nn.Module):
    """LayerNorm and Mamba on the cells of a map; (b, c, *grid) to itself."""

    def __init__(self, dim: int, *, mixer: Mixer, state: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, mixer=mixer, state=state)

    def forward(self, x: Tensor) -> Tensor:
        return self.mamba(self.norm(x.movedim(1, -1))).movedim(-1, 1).contiguous()


class Up(nn.Module):
    """Enlarges the coarse map, joins the skip, convolves."""

    def __init__(self, enlarge: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.enlarge, self.blocks = enlarge, blocks

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(torch.cat([self.enlarge(coarse), skip], dim=1))


def residual_blocks(
    spatial_dims: int, channels: int, width: int, kernel: Sequence[int], stride: int | Sequence[int], count: int
) -> nn.Sequential:
    """Residual blocks, the first of which changes width and resolution."""
    first = UnetResBlock(spatial_dims, channels, width, kernel, stride, INSTANCE_NORM)
    others = (UnetResBlock(spatial_dims, width, width, kernel, 1, INSTANCE_NORM) for _ in range(count - 1))
    return nn.Sequential(first, *others)


def enlarge(spatial_dims: int, channels: int, width: int, stride: Sequence[int]) -> nn.Module:
    """A transposed convolution whose patches do not overlap."""
    return get_conv_layer(spatial_dims, channels, width, kernel_size=stride, stride=stride, is_transposed=True)


def per_stage(name: str, value: PerStage, stages: int, axes: int) -> list[tuple[int, ...]]:
    """A value of each stage along each axis, from one for all stages or one for each.

    Raises:
        ValueError: another number of stages or axes, or a value below 1.
    """
    values = [value] * stages if isinstance(value, int) else list(value)
    found = [(entry,) * axes if isinstance(entry, int) else tuple(entry) for entry in values]
    if len(found) != stages or any(len(entry) != axes or min(entry) < 1 for entry in found):
        raise ValueError(
            f"{name} must be a number of at least 1, or one for each of {stages} stages, itself a number or one for "
            f"each of {axes} axes; got {value!r}"
        )
    return found
