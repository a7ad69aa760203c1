"""The decoding half of a U-Net whose sizes fit: joins maps from coarse to fine and predicts."""

# Shapes: b batch, c channels.

from collections.abc import Sequence

from monai.networks.blocks import UnetOutBlock
from torch import Tensor, nn

from .padding import crop_map

__all__ = ["INSTANCE_NORM", "Decoder", "WithoutSkip"]

INSTANCE_NORM = ("instance", {"affine": True})
"""Norm of the convolutional blocks, as MONAI names it."""


class Decoder(nn.Module):
    """Modules up(coarse, skip) in turn, and a projection to logits at each level that predicts.

    ``deep_supervision`` may be switched; where it was off from the beginning there is one projection only.

    Args:
        spatial_dims: axes of the maps.
        up: joins the map of each level, finest first, with what comes from below.
        widths: channels of what each ``up`` returns.
        out_channels: classes.
        deep_supervision: predict at every level while training, not at the finest alone.

    Shapes: maps (b, c_i, *grid_i) of a padded image, finest first, one more than ``up``; sizes of the image as it was;
    reductions of each map along each axis -> logits (b, out_channels, *sizes). With deep supervision, and only while
    training, a list of logits, finest first; where a map is reduced by r they have ceil(size / r) cells.
    """

    def __init__(
        self,
        spatial_dims: int,
        up: Sequence[nn.Module],
        widths: Sequence[int],
        out_channels: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.up = nn.ModuleList(reversed(up))
        self.heads = nn.ModuleList(
            UnetOutBlock(spatial_dims, width, out_channels) for width in (widths if deep_supervision else widths[:1])
        )

    def forward(self, maps: list[Tensor], sizes: list[int], reductions: list[list[int]]) -> Tensor | list[Tensor]:
        decoded = [maps[-1]]
        for level, up in enumerate(self.up):
            decoded.append(up(decoded[-1], maps[-2 - level]))
        every = self.deep_supervision and self.training
        logits: list[Tensor] = []
        for level, head in enumerate(self.heads):
            if level == 0 or every:
                logits.append(crop_map(head(decoded[-1 - level]), sizes, reductions[level]))
        if every:  # a script knows no choice between a list and one of its items
            return logits
        return logits[0]


class WithoutSkip(nn.Module):
    """A module of the coarse map alone, where a decoder expects one that joins a skip."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.module(coarse)
