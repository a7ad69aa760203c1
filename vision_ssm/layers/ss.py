"""VMamba's layer around a mixer of cells.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
"""

# Shapes: b batch, h w grid, c channels, e inner channels.

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .mixers import Mixer, find_mixer


class SS2D(nn.Module):
    """Project, convolve, scan, project back (VMamba, section 4.2).

    Args:
        dim: channels c in and out.
        state: size n of each channel's state.
        expand: inner width e as a multiple of ``dim``.
        rank: rank of the projection of Δ; ceil(dim / 16) by default.
        mixer: what mixes the cells: a name in ``vision_ssm.layers.MIXERS``, or a callable mixer(e, state=, rank=) that
            makes a module.
        gate: multiply the output by SiLU of a second projection of the input (VMamba v0, Mamba).
        conv_bias: bias of the depthwise convolution.

    Shapes: (b, h, w, c) -> (b, h, w, c), channels-last throughout.

    Raises:
        ValueError: unknown mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 1,
        expand: float = 1.0,
        rank: int | None = None,
        mixer: str | Mixer = "cross",
        gate: bool = False,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.scan = find_mixer(mixer)(inner, state=state, rank=rank or math.ceil(dim / 16))
        self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z: Tensor | None = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.norm(self.scan(x))
        return self.out_proj(y if z is None else y * F.silu(z))
