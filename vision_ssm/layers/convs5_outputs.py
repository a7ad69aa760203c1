"""The blocks that follow a ConvS5's recurrence."""
# Shapes: n maps, c channels, h rows, w columns.

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from .norm_act import norm_act
from .over_time import EPS

__all__ = ["GELU", "HalfGLUOutput", "ResNetOutput", "StandardOutput"]

GELU = partial(nn.GELU, approximate="tanh")


class ResNetOutput(nn.Module):
    """act(y + conv(act(norm(conv(act(norm(y))))))), in all published models; the input u has no path of its own.

    Args:
        dim: channels c.
        groups: groups of the norms.
        kernel: size of both convolutions, odd.
        activation: makes the activations.

    Shapes: y, u (n, c, h, w) -> (n, c, h, w).
    """

    def __init__(
        self, dim: int, *, groups: int = 32, kernel: int = 3, activation: Callable[[], nn.Module] = GELU
    ) -> None:
        super().__init__()
        self.act = activation()
        self.norm1 = nn.GroupNorm(groups, dim, eps=EPS)
        self.conv1 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
        self.norm2 = nn.GroupNorm(groups, dim, eps=EPS)
        self.conv2 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        inner = self.conv1(norm_act(self.norm1, self.act, y))
        return self.act(y + self.conv2(norm_act(self.norm2, self.act, inner)))


class StandardOutput(nn.Module):
    """act(norm(y + conv(u))), then squeeze and excitation where asked for.

    Args:
        dim: channels c.
        groups: groups of the norm.
        kernel: size of the convolution D, odd.
        activation: makes the activation.
        squeeze: weigh channels by their means over the map.

    Shapes: y, u (n, c, h, w) -> (n, c, h, w).
    """

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 32,
        kernel: int = 3,
        activation: Callable[[], nn.Module] = GELU,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        self.D = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
        self.norm = nn.GroupNorm(groups, dim, eps=EPS)
        self.act = activation()
        self.squeeze = SqueezeExcite(dim, rd_channels=max(dim // 16, 4)) if squeeze else nn.Identity()

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return self.squeeze(self.act(self.norm(y + self.D(u))))


class HalfGLUOutput(nn.Module):
    """g sigmoid(linear(g)) with g = GELU(norm(y)): y, u (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.act = GELU()
        self.gate = nn.Linear(dim, dim)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        y = self.act(self.norm(y.movedim(1, -1)))
        return (y * torch.sigmoid(self.gate(y))).movedim(-1, 1)
