"""A group norm and the activation that follows it, in one pass where that is faster."""

from torch import Tensor, nn

from vision_ssm.kernels.group_norm.op import group_norm_act

__all__ = ["norm_act"]


def norm_act(norm: nn.GroupNorm, act: nn.Module, x: Tensor) -> Tensor:
    """act(norm(x)), maps (n, c, h, w) -> alike; fused on a GPU if the activation is ELU or GELU by tanh.

    Hooks of the two modules are not called where they are fused.
    """
    match act:
        case nn.GELU(approximate="tanh"):
            activation = "gelu_tanh"
        case nn.ELU(alpha=1.0):
            activation = "elu"
        case _:
            return act(norm(x))  # type: ignore[no-any-return]
    return group_norm_act(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=activation)
