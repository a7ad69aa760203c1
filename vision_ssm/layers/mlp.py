"""The MLP of a block, kept small in training."""

import torch
from timm.layers import Mlp
from timm.models import checkpoint, register_notrace_module
from torch import Tensor

__all__ = ["LeanMlp"]


@register_notrace_module
class LeanMlp(Mlp):
    """timm's MLP, without dropout, that computes its activation anew in the backward.

    A block's map is at its widest before and after the activation, and two gradients ask for one each. The second is
    cheap to make again, but PyTorch keeps it, compiled or not.

    Shapes: (..., c) -> (..., c).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.training and not torch.jit.is_scripting():
            y: Tensor = checkpoint(self.activate, x, preserve_rng_state=False)
            return y
        return self.activate(x)

    def activate(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(x))
        return y
