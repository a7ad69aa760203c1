"""The registry of mixers: what mixes the cells of a map, by name."""

# Shapes: b batch, e channels, l cells.

import math
from collections.abc import Callable
from functools import partial

from timm.layers import Attention
from torch import Tensor, nn

from vision_ssm.kernels import atrous, axial, hilbert, raster, tri
from vision_ssm.kernels.routes import RouteSet

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


def along(routes: RouteSet) -> Mixer:
    """The selective scan of a map along the routes that the set has for its axes."""

    def mixer(dim: int, *, state: int, rank: int, spatial_dims: int = 2) -> nn.Module:
        return RoutedScan(dim, state=state, rank=rank, routes=routes(spatial_dims))

    return mixer


def hydra(dim: int, *, state: int, rank: int, spatial_dims: int = 2) -> nn.Module:
    """Hydra's quasiseparable mixer, with heads of at most 64 channels."""
    return OnTokens(Hydra(dim, state=state, expand=1.0, head_dim=math.gcd(dim, 64)))


def mambamixer(dim: int, *, state: int, rank: int, spatial_dims: int = 2) -> nn.Module:
    """A cross scan of the cells, then a scan of the channels of each cell (MambaMixer)."""
    return nn.Sequential(RoutedScan(dim, state=state, rank=rank, routes=axial(spatial_dims)), PerCell(4, state=state))


def attention(dim: int, *, state: int, rank: int, spatial_dims: int = 2) -> nn.Module:
    """Self-attention of all cells, with heads of at most 32 channels."""
    return OnTokens(Attention(dim, num_heads=dim // math.gcd(dim, 32)))


def identity(dim: int, *, state: int, rank: int, spatial_dims: int = 2) -> nn.Module:
    return nn.Identity()


MIXERS: dict[str, Mixer] = {
    "cross": along(axial),
    "bidirectional": along(raster),
    "atrous": along(partial(atrous, 2)),
    "tri": along(tri),
    "hilbert": along(hilbert),
    "hydra": hydra,
    "mambamixer": mambamixer,
    "attention": attention,
    "identity": identity,
}
"""Mixers by name, each called as mixer(dim, state=, rank=, spatial_dims=) for maps (b, *grid, dim) with so many axes.

``cross`` runs along every axis there and back: four routes on an image, six in a volume. ``atrous`` has four and eight.
``identity`` is the same network without any, the control of every comparison."""


def find_mixer(mixer: str | Mixer, spatial_dims: int = 2) -> Mixer:
    """What makes the mixer of that name for maps of so many axes, as mixer(dim, state=, rank=); or the callable itself.

    Raises:
        ValueError: there is no such name; lists those that there are.
    """
    if not isinstance(mixer, str):
        return mixer
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; the mixers are {', '.join(MIXERS)}")
    return partial(MIXERS[mixer], spatial_dims=spatial_dims)
