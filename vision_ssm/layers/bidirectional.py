"""Selective scan of token sequences in both directions: Vim's mixer.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML 2024,
arXiv:2401.09417.
"""

# Shapes: b batch, l tokens, e channels.

import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.kernels import Route

from .scan import RoutedScan
from .token_convolution import TokenConvolution


class Direction(nn.Module):
    """Causal depthwise convolution, SiLU and selective scan along the tokens, or against them: (b, l, e) -> (b, l, e).

    Against the tokens nothing is reversed in memory: the scan's route is, and the convolution looks ahead. Its taps are
    stored in the order of the tokens, the last one on the token itself for the way ahead, the first for the way back.

    Args:
        dim: channels e.
        state: size n of each channel's state.
        rank: rank of the projection of Δ.
        reverse: from the last token to the first.
        taps: width of the convolution.
    """

    def __init__(self, dim: int, *, state: int, rank: int, reverse: bool, taps: int = 4) -> None:
        super().__init__()
        before, after = (0, taps - 1) if reverse else (taps - 1, 0)
        self.conv = TokenConvolution(dim, before=before, after=after)
        self.scan = RoutedScan(dim, state=state, rank=rank, routes=(Route((0,), reverse=reverse),))

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(F.silu(self.conv(x)))


class BothDirections(nn.Module):
    """The mean of a scan along the tokens and one against them, each with its own weights: (b, l, e) -> (b, l, e)."""

    def __init__(self, dim: int, *, state: int, rank: int) -> None:
        super().__init__()
        self.ahead = Direction(dim, state=state, rank=rank, reverse=False)
        self.back = Direction(dim, state=state, rank=rank, reverse=True)

    def forward(self, x: Tensor) -> Tensor:
        return (self.ahead(x) + self.back(x)) / 2
