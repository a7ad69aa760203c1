"""Layers over time: what they take and give, and how they are stacked."""
# Shapes: t frames, b clips, h rows, w columns, c channels.

from collections.abc import Iterable

import torch
from timm.models import checkpoint
from torch import Tensor, nn

__all__ = ["EPS", "State", "TemporalStack", "check_clip"]

EPS = 1e-6  # of every norm


def check_clip(u: Tensor, dim: int) -> torch.Size:
    """Raises ValueError unless ``u`` is (t, b, h, w, dim) with no empty axis; returns (t, b, h, w)."""
    if u.ndim != 5 or u.shape[-1] != dim or 0 in u.shape:
        raise ValueError(f"clips must be (frames, clips, height, width, {dim}) and not empty; got {tuple(u.shape)}")
    return u.shape[:-1]


State = tuple[Tensor, ...]
"""States of all layers of a stack."""


class TemporalStack(nn.Module):
    """Layers over time in series, each with a state of its own.

    Args:
        layers: the layers, called as layer(u, state, reset) for outputs and the last state.

    Shapes: u (t, b, h, w, c), states of all layers or none for zeros, and reset (t, b) -> (t, b, h, w, c) and the last
    states.

    Raises:
        ValueError: as many states as layers are needed.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of each layer, keep only what enters for the backward pass, and compute the rest a second time."""
        self.grad_checkpointing = enable

    def forward(self, u: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not None and (isinstance(state, Tensor) or len(state) != len(self.layers)):
            got = "a tensor" if isinstance(state, Tensor) else len(state)
            raise ValueError(f"{len(self.layers)} layers need as many states; got {got}. Is it another model's?")
        u = u.contiguous()  # channels last, for convolutions and the scan, which would otherwise copy in each layer
        last = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                u, after = checkpoint(layer, u, before, reset)
            else:
                u, after = layer(u, before, reset)
            last.append(after)
        return u, tuple(last)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One frame: x (b, h, w, c) and states -> (b, h, w, c) and the next states."""
        y, state = self(x[None], state)
        return y[0], state
