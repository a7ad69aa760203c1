"""VMamba's layer around a mixer of cells, for images and volumes.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
"""

# Shapes: b batch, grid (h, w) or (d, h, w), c channels, e inner channels.

import math
from collections.abc import Callable, Sequence
from functools import partialmethod

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Conv1d, Conv2d, Conv3d
from .mixers import Mixer, find_mixer

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


class SS(nn.Module):
    """Project, convolve, scan, project back (VMamba, section 4.2).

    Args:
        dim: channels c in and out.
        spatial_dims: axes of the grid, 1 to 3.
        kernel_size: width of the depthwise convolution, odd; one for all axes, or one for each, such as (1, 3, 3) where
            slices are thick.
        state: size n of each channel's state.
        expand: inner width e as a multiple of ``dim``.
        rank: rank of the projection of Δ; ceil(dim / 16) by default.
        mixer: what mixes the cells: a name in ``vision_ssm.layers.MIXERS``, which chooses its routes by
            ``spatial_dims``, or a callable mixer(e, state=, rank=) that makes a module.
        gate: multiply the output by SiLU of a second projection of the input (VMamba v0, Mamba).
        conv_bias: bias of the depthwise convolution.

    Shapes: (b, *grid, c) -> (b, *grid, c), channels-last throughout, any grid with cells.

    Raises:
        ValueError: unknown mixer, other ``spatial_dims``, or a kernel that is even or has other axes.
    """

    def __init__(
        self,
        dim: int,
        *,
        spatial_dims: int,
        kernel_size: int | Sequence[int] = 3,
        state: int = 1,
        expand: float = 1.0,
        rank: int | None = None,
        mixer: str | Mixer = "cross",
        gate: bool = False,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"spatial_dims must be 1, 2 or 3; got {spatial_dims}")
        kernel = per_axis("kernel_size", kernel_size, spatial_dims)
        if not all(size % 2 for size in kernel):
            raise ValueError(f"kernel_size must be odd, so that a kernel has a centre; got {kernel_size}")
        inner = int(expand * dim)
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv = CONVOLUTIONS[spatial_dims](
            inner, inner, kernel, padding=tuple(size // 2 for size in kernel), groups=inner, bias=conv_bias
        )
        self.scan = find_mixer(mixer, spatial_dims)(inner, state=state, rank=rank or math.ceil(dim / 16))
        self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Cells are a list wherever their places do not matter: inductor takes every result of four axes for a map with
        # its channels in front, and where a convolution is near lays it out anew.
        grid = x.shape[1:-1]
        x = self.in_proj(x.flatten(1, -2))
        z: Tensor | None = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2))
        y = self.norm(self.scan(x.unflatten(1, grid)).flatten(1, -2))
        return self.out_proj(y if z is None else y * F.silu(z)).unflatten(1, grid)


class SS2D(SS):
    """The layer for images, (b, h, w, c)."""

    __init__ = partialmethod(SS.__init__, spatial_dims=2)


class SS3D(SS):
    """The layer for volumes, (b, d, h, w, c)."""

    __init__ = partialmethod(SS.__init__, spatial_dims=3)


def per_axis(name: str, value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """A size for each axis, of one for all or of as many as there are axes, each at least 1.

    Raises:
        ValueError: another number of sizes, or one below 1.
    """
    sizes = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(sizes) != spatial_dims or min(sizes) < 1:
        raise ValueError(f"{name} must be one size or {spatial_dims}, each at least 1; got {value}")
    return sizes
