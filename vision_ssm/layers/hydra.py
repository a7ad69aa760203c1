"""Quasiseparable mixer of token sequences: Hydra.

Hwang et al., "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", NeurIPS 2024,
arXiv:2407.09941.
"""

# Shapes: b batch, l tokens, c channels, e inner channels, h heads of width p, g groups of heads, n state.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vision_ssm.kernels import ssd_scan

from .init import dt_bias_
from .token_convolution import TokenConvolution

Combination = Callable[[Tensor, Tensor, Tensor], Tensor]


def quasiseparable(ahead: Tensor, back: Tensor, diagonal: Tensor) -> Tensor:
    """Scans of what lies before and after a token, without the token itself, and a free diagonal (equation 7)."""
    return F.pad(ahead[:, :-1], (0, 0, 0, 0, 1, 0)) + F.pad(back[:, 1:], (0, 0, 0, 0, 0, 1)) + diagonal


def add(ahead: Tensor, back: Tensor, diagonal: Tensor) -> Tensor:
    """Both scans with the token itself, which counts twice."""
    return ahead + back + diagonal


def multiply(ahead: Tensor, back: Tensor, diagonal: Tensor) -> Tensor:
    """The product of both scans, entry by entry."""
    return ahead * back + diagonal


def concatenate(ahead: Tensor, back: Tensor, diagonal: Tensor) -> Tensor:
    """Both scans side by side as heads of their own; the projection back weighs them."""
    return torch.cat([ahead + diagonal, back + diagonal], dim=2)


COMBINATIONS: dict[str, Combination] = {
    "quasiseparable": quasiseparable,
    "add": add,
    "multiply": multiply,
    "concatenate": concatenate,
}
"""How the two directions become one: Hydra's way, and the ones that its paper compares (table 3)."""


@register_notrace_module
class Hydra(nn.Module):
    """Project, convolve, scan in both directions, normalise, gate, project back.

    Both directions share the tokens, their convolution, A and the bias of Δ, and have B, C and Δ of their own.

    Args:
        dim: channels c in and out.
        state: size n of the state of each channel.
        expand: inner width e as a multiple of ``dim``.
        head_dim: width p of a head; all channels of a head decay alike.
        groups: groups of heads that share B and C.
        taps: width of the centred convolution, odd.
        bias: biases of the two projections.
        learned_state: a learned state before the first and after the last token, the same for both directions.
        combine: how the directions become one, a name in :data:`COMBINATIONS`.

    Shapes: (b, l, c) -> (b, l, c), any l >= 1.

    Raises:
        ValueError: unknown combination, an even ``taps``, or widths that do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 64,
        expand: float = 2.0,
        head_dim: int = 64,
        groups: int = 1,
        taps: int = 7,
        bias: bool = False,
        learned_state: bool = False,
        combine: str = "quasiseparable",
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        heads = inner // head_dim
        if combine not in COMBINATIONS:
            raise ValueError(f"unknown combine={combine!r}; the combinations are {', '.join(COMBINATIONS)}")
        if taps % 2 == 0:
            raise ValueError(f"taps must be odd, so that the convolution has a centre; got {taps}")
        if inner % head_dim or heads % groups:
            raise ValueError(
                f"head_dim must divide the inner width {inner} and groups the number of heads; "
                f"got head_dim={head_dim}, groups={groups}"
            )
        self.combine = COMBINATIONS[combine]
        self.head_dim, self.groups, self.state = head_dim, groups, state
        self.widths = [inner, inner + 4 * groups * state, 2 * heads]  # of the gate, of what is convolved, of Δ
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=bias)
        convolved = self.widths[1]
        self.conv = TokenConvolution(convolved, before=taps // 2, after=taps // 2)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.diagonal = nn.Linear(inner, heads, bias=False)
        self.initial_state = nn.Parameter(torch.empty(heads, head_dim, state)) if learned_state else None
        out = 2 * inner if combine == "concatenate" else inner
        self.norm = nn.RMSNorm(out, eps=1e-5)
        self.out_proj = nn.Linear(out, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as released: A = -1, D = 1, Δ log-uniform in [0.001, 0.1], a learned state of zeros."""
        dt_bias_(self.dt_bias)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)
        if self.initial_state is not None:
            nn.init.zeros_(self.initial_state)

    def forward(self, x: Tensor) -> Tensor:
        z, convolved, dt = self.in_proj(x).split(self.widths, dim=-1)
        convolved = F.silu(self.conv(convolved))
        y = self.mix(convolved, dt).flatten(2)
        gate = F.silu(z)
        return self.out_proj(self.norm(y) * (gate.repeat(1, 1, 2) if y.shape[-1] > gate.shape[-1] else gate))

    def mix(self, convolved: Tensor, dt: Tensor) -> Tensor:
        """What is convolved, (b, l, e + 4 g n), and Δ before softplus, (b, l, 2 h), to mixed heads, (b, l, h, p)."""
        inner, size = self.widths[0], self.groups * self.state
        x, maps = convolved.split([inner, 4 * size], dim=-1)
        # The convolution leaves tokens innermost. The scans take them as a list, and would copy x once for each.
        x = x.contiguous()
        B, C, B_back, C_back = [m.contiguous() for m in maps.unflatten(-1, (4, self.groups, self.state)).unbind(2)]
        diagonal = self.diagonal(x) + self.D
        x = x.unflatten(-1, (-1, self.head_dim))
        A = -torch.exp(self.A_log)
        # In the bias's dtype or wider: Δ stays precise.
        steps, steps_back = [F.softplus(m + self.dt_bias) for m in dt.chunk(2, dim=-1)]
        state = None if self.initial_state is None else self.initial_state.expand(x.shape[0], -1, -1, -1)
        ahead = _scan(x, steps, A, B, C, state, False)
        back = _scan(x, steps_back, A, B_back, C_back, state, True)
        return self.combine(ahead, back, diagonal[..., None] * x)


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, reverse: bool) -> Tensor:
    """The output of ``ssd_scan``, or of its operator in a script, which knows no keyword-only arguments."""
    if torch.jit.is_scripting():
        return torch.ops.vision_ssm.ssd_scan(x, dt, A, B, C, state, reverse)[0]
    return ssd_scan(x, dt, A, B, C, initial_state=state, reverse=reverse)[0]


class HydraTwin(nn.Module):
    """Hydra without convolution and scans: project, normalise, gate, project back; (b, l, c) -> (b, l, c)."""

    def __init__(self, dim: int, *, expand: float = 2.0, bias: bool = False) -> None:
        super().__init__()
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        z, x = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.norm(x) * F.silu(z))
