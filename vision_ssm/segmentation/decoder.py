"""The decoding half of a U-Net whose sizes fit: joins maps from coarse to fine and predicts."""

# Shapes: b batch, c channels.

from collections.abc import Sequence

from monai.networks.blocks import UnetOutBlock
from torch import Tensor, nn


class Decoder(nn.Module):
    """Modules up(coarse, skip) in turn, and a projection to logits at each level that predicts.

    ``deep_supervision`` may be switched; where it was off from the beginning there is one projection only.

    Args:
        spatial_dims: axes of the maps.
        up: joins the map of each level, finest first, with what comes from below.
        widths: channels of what each ``up`` returns.
        out_channels: classes.
        deep_supervision: predict at every level while training, not at the finest alone.

    Shapes: maps (b, c_i, *grid_i), finest first, one more than ``up`` -> list of logits (b, out_channels, *grid_i),
    finest first.
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

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        decoded = [maps[-1]]
        for level, up in enumerate(self.up):
            decoded.append(up(decoded[-1], maps[-2 - level]))
        logits: list[Tensor] = []
        for level, head in enumerate(self.heads):
            if level == 0 or (self.deep_supervision and self.training):
                logits.append(head(decoded[-1 - level]))
        return logits
