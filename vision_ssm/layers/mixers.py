"""The registry of mixers: what mixes the cells of a map, by name."""

# Shapes: b batch, e channels, l cells.

import math
from collections.abc import Callable
from functools import partial

from timm.layers import Attention
from torch import Tensor, nn

from vision_ssm.kernels import ATROUS, BIDIRECTIONAL

from .channel_mixer import PerCell
from .hydra import Hydra
from .scan import RoutedScan

Mixer = Callable[..., nn.Module]


class OnTokens(nn.Module):
    """A mixer of sequences, (b, l, e) -> (b, l, e), on the cells of a map in row-major order: (b, *grid, e)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.flatten(1, -2)).view(x.shape)


def hydra(dim: int, *, state: int, rank: int) -> nn.Module:
    """Hydra's quasiseparable mixer, with heads of at most 64 channels."""
    return OnTokens(Hydra(dim, state=state, expand=1.0, head_dim=math.gcd(dim, 64)))


def mambamixer(dim: int, *, state: int, rank: int) -> nn.Module:
    """A cross scan of the cells, then a scan of the channels of each cell (MambaMixer)."""
    return nn.Sequential(RoutedScan(dim, state=state, rank=rank), PerCell(4, state=state))


def attention(dim: int, *, state: int, rank: int) -> nn.Module:
    """Self-attention of all cells, with heads of at most 32 channels."""
    return OnTokens(Attention(dim, num_heads=dim // math.gcd(dim, 32)))


def identity(dim: int, *, state: int, rank: int) -> nn.Module:
    return nn.Identity()


MIXERS: dict[str, Mixer] = {
    "cross": RoutedScan,
    "bidirectional": partial(RoutedScan, routes=BIDIRECTIONAL),
    "atrous": partial(RoutedScan, routes=ATROUS),
    "hydra": hydra,
    "mambamixer": mambamixer,
    "attention": attention,
    "identity": identity,
}
"""Mixers by name, each called as mixer(dim, state=, rank=) for maps (b, *grid, dim); ``identity`` is the same network
without any, the control of every comparison."""


def find_mixer(mixer: str | Mixer) -> Mixer:
    """The mixer of that name, or the callable itself; raises a ValueError that lists the names otherwise."""
    if not isinstance(mixer, str):
        return mixer
    try:
        return MIXERS[mixer]
    except KeyError:
        raise ValueError(f"unknown mixer {mixer!r}; the mixers are {', '.join(MIXERS)}") from None
