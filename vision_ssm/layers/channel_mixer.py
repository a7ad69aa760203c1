"""Selective scans along the channels of a map, and learned averages of earlier features: MambaMixer.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888. No code was released.
"""

# Shapes: b batch, h w grid, c channels, e inner channels, f features of a channel.

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bidirectional import BothDirections


class PerCell(nn.Module):
    """The channels of each cell as a sequence of numbers, each lifted to f features; (b, *grid, e) to itself."""

    def __init__(self, features: int, *, state: int) -> None:
        super().__init__()
        self.lift = nn.Linear(1, features)
        self.scan = BothDirections(features, state=state, rank=1)
        self.lower = nn.Linear(features, 1)

    def reset_parameters(self) -> None:
        """PyTorch's initial values: those of a backbone's wide projections leave next to nothing of one number."""
        self.lift.reset_parameters()
        self.lower.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lower(self.scan(self.lift(x.flatten(0, -2)[..., None])))
        return y.squeeze(-1).view(x.shape)


class Pooled(nn.Module):
    """The channels of the whole map as one sequence, each with the means of f = side x side parts of the map.

    What comes out is enlarged to the map again: cheaper than a scan for each cell, and blind to what lies within a
    part. (b, h, w, e) -> (b, h, w, e).
    """

    def __init__(self, features: int, *, state: int) -> None:
        super().__init__()
        self.side = round(features**0.5)
        if self.side**2 != features:
            raise ValueError(f"features of a pooled channel must be a square number; got {features}")
        self.scan = BothDirections(features, state=state, rank=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.side)
        mixed = self.scan(parts.flatten(2)).view(parts.shape)
        return F.interpolate(mixed, size=x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)


def unmixed(features: int, *, state: int) -> nn.Module:
    """No scan: the same layer without the SSM."""
    return nn.Identity()


ChannelScan = Callable[..., nn.Module]

CHANNEL_SCANS: dict[str, ChannelScan] = {"cell": PerCell, "pooled": Pooled, "identity": unmixed}
"""What a channel is to the scan along channels; the paper leaves it open. Each takes any size of map."""


class ChannelMixer(nn.Module):
    """Project, scan along the channels in both directions, gate, project back (section 3.2).

    Args:
        dim: channels c in and out.
        inner: inner channels e, the length of the scan.
        state: size n of the state of each feature.
        features: features f of each channel.
        scan: what a channel is to the scan, a name in :data:`CHANNEL_SCANS`.

    Shapes: (b, h, w, c) -> (b, h, w, c).

    Raises:
        ValueError: unknown scan.
    """

    def __init__(self, dim: int, inner: int, *, state: int = 16, features: int = 4, scan: str = "cell") -> None:
        super().__init__()
        if scan not in CHANNEL_SCANS:
            raise ValueError(f"unknown channel scan {scan!r}; the scans are {', '.join(CHANNEL_SCANS)}")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.scan = CHANNEL_SCANS[scan](features, state=state)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        x, z = self.in_proj(x.flatten(1, -2)).chunk(2, dim=-1)
        y = self.scan(x.unflatten(1, grid)).flatten(1, -2)
        return self.out_proj(y * F.silu(z)).unflatten(1, grid)


class WeightedAverage(nn.Module):
    """A sum of features with learned weights, which begin as 1 for the ``newest`` and 0 for the others (section 3.3).

    Args:
        count: how many features there are.
        newest: indices of those that count at the beginning.
    """

    def __init__(self, count: int, newest: Sequence[int]) -> None:
        super().__init__()
        self.newest = tuple(newest)
        self.weight = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.weight[list(self.newest)] = 1.0

    def forward(self, features: list[Tensor]) -> Tensor:
        total = self.weight[0] * features[0]
        for i in range(1, len(features)):
            total = total + self.weight[i] * features[i]
        return total
