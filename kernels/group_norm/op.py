"""``group_norm_act``: group norm and an activation in one pass over maps that have their channels last."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_shape, check_tensors, compute_dtype

__all__ = ["ACTIVATIONS", "group_norm_act"]

ACTIVATIONS = ("gelu_tanh", "elu")

_INPUTS = "int groups, Tensor weight, Tensor bias, float eps, str activation"


def group_norm_act(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, eps: float, activation: str) -> Tensor:
    """act(group_norm(x)), in x's dtype.

    On a GPU, PyTorch's norm copies maps that have channels last to channels first and, under autocast, to float32, and
    back for the convolution that follows; this one reads and writes them as they are. It computes in float32, or in
    float64 if an input is. Elsewhere, and in a program that torch.compile fuses, it is PyTorch's.

    Args:
        x: maps (n, c, h, w).
        groups: equal groups of channels.
        weight: (c).
        bias: (c).
        eps: added to the variance.
        activation: "gelu_tanh" or "elu".

    Raises:
        ValueError: shapes or dtypes do not fit, or an activation that is not one of these.
    """
    _check(x, groups, weight, bias, eps, activation)
    if x.is_cuda and not torch.compiler.is_compiling():
        y: Tensor = torch.ops.vision_ssm.group_norm_act(x, groups, weight, bias, eps, activation)[0]
        return y
    z = F.group_norm(x, groups, weight, bias, eps)
    return F.elu(z) if activation == "elu" else F.gelu(z, approximate="tanh")


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str) -> None:
    op = "group_norm_act"
    check_tensors(op, {"x": x, "weight": weight, "bias": bias})
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: x must be (n, c, h, w), c a multiple of {groups} groups; got {tuple(x.shape)}")
    for name, m in (("weight", weight), ("bias", bias)):
        check_shape(op, name, m, {"channels": x.shape[1]})
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


@torch.library.custom_op(
    "vision_ssm::group_norm_act",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and means and inverse deviations (n, groups), which the backward takes."""
    dtype = compute_dtype(x, weight, bias)
    grouped = x.to(dtype).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + eps)
    z = _normed(x.to(dtype), mean, rstd) * _by_channel(weight.to(dtype)) + _by_channel(bias.to(dtype))
    y = F.elu(z) if activation == "elu" else F.gelu(z, approximate="tanh")
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last), mean, rstd


@_forward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(inputs[0].device):
        found: tuple[Tensor, Tensor, Tensor] = gpu_module("group_norm").forward(*inputs)
    return found


@_forward.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(len(x), groups, dtype=compute_dtype(x, weight, bias))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, torch.empty_like(mean)


@torch.library.custom_op(
    "vision_ssm::group_norm_act_backward",
    mutates_args=(),
    device_types="cpu",
    schema=(
        "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, str activation)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias."""
    normed, scale = _normed(x.to(mean.dtype), mean, rstd), _by_channel(weight.to(mean.dtype))
    z = normed * scale + _by_channel(bias.to(mean.dtype))
    if activation == "elu":
        dz = torch.ops.aten.elu_backward(dy.to(z.dtype), 1, 1, 1, False, z)
    else:
        dz = torch.ops.aten.gelu_backward(dy.to(z.dtype), z, approximate="tanh")
    inner = (dz * scale).unflatten(1, (mean.shape[1], -1))
    along = (inner * normed.reshape(inner.shape)).mean(dim=(2, 3, 4), keepdim=True) * normed.reshape(inner.shape)
    dx = (inner - inner.mean(dim=(2, 3, 4), keepdim=True) - along) * rstd[..., None, None, None]
    dx = dx.flatten(1, 2).to(x.dtype).contiguous(memory_format=torch.channels_last)
    dweight, dbias = (dz * normed).sum(dim=(0, 2, 3)), dz.sum(dim=(0, 2, 3))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


@_backward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(inputs[0].device):
        found: tuple[Tensor, Tensor, Tensor] = gpu_module("group_norm").backward(*inputs)
    return found


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), torch.empty_like(bias)


def _by_channel(m: Tensor) -> Tensor:
    return m.view(-1, 1, 1)


def _normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) rstd, like x; means and inverse deviations are (n, groups)."""
    mean, rstd = (m[..., None, None, None] for m in (mean, rstd))
    return ((x.unflatten(1, (mean.shape[1], -1)) - mean) * rstd).flatten(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = torch.ops.vision_ssm.group_norm_act_backward(dy, *ctx.saved_tensors, ctx.activation)
    return dx, None, dweight, dbias, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
