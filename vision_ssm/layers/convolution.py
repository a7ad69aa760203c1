"""Convolutions that ``torch.compile`` trains on a CPU at every size with one compilation.

PyTorch 2.13 and 2.14 compile the gradient of a convolution anew for each size of its map, whatever ``dynamic`` says,
and stop on a CPU at a channels-last map that is kept for the gradient. Here it is an operator that inductor does not
look into; what is kept is the list of cells. Elsewhere the modules are PyTorch's own: without compilation, without
gradients, in exported programs and in scripts, and on GPUs.
"""

# Shapes: b batch, l cells, c channels.

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Conv1d", "Conv2d", "Conv3d", "trains_compiled"]

_GEOMETRY = "SymInt[] grid, int[] stride, int[] padding, int[] dilation, int groups"


def _map(cells: Tensor, grid: Sequence[int]) -> Tensor:
    return cells.transpose(1, 2).unflatten(2, grid)


def _cells(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()


def _grid_after(
    weight: Tensor, grid: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    axes = zip(grid, weight.shape[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * pad - spread * (taps - 1) - 1) // step + 1 for size, taps, step, pad, spread in axes]


@torch.library.custom_op(
    "vision_ssm::convolution",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], *window: Any) -> Tensor:
    stride, padding, dilation, groups = window
    maps = _map(x, grid)
    return _cells(torch.convolution(maps, weight, bias, stride, padding, dilation, False, [0] * len(grid), groups))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], *window: Any) -> Tensor:
    return x.new_empty(x.shape[0], math.prod(_grid_after(weight, grid, *window[:3])), weight.shape[0])


@torch.library.custom_op(
    "vision_ssm::convolution_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}, bool[] mask) -> (Tensor, Tensor, Tensor)",
)
def _backward(dy: Tensor, x: Tensor, weight: Tensor, grid: Sequence[int], *window: Any) -> tuple[Tensor, ...]:
    *spacing, groups, mask = window
    maps = _map(dy, _grid_after(weight, grid, *spacing)), _map(x, grid)
    dx, dw, db = torch.ops.aten.convolution_backward(
        *maps, weight, [weight.shape[0]], *spacing, False, [0] * len(grid), groups, mask
    )
    none = x.new_empty(0)
    return (
        _cells(dx) if mask[0] else none,
        dw.contiguous() if mask[1] else none.clone(),
        db if mask[2] else none.clone(),
    )


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, grid: Sequence[int], *window: Any) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, window[-1], strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:3])
    grads = torch.ops.vision_ssm.convolution_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.geometry, mask)
    return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_setup_context)


@torch.jit.unused
def trains_compiled() -> bool:
    """Whether gradients are being compiled, and no program is exported."""
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and hasattr(torch.compiler, "is_exporting")  # torch 2.6 cannot tell, and does well without the operator
        and not torch.compiler.is_exporting()
    )


class _Convolution(_ConvNd):
    """What the three classes below add to PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or not trains_compiled() or x.device.type != "cpu" or self.padding_mode != "zeros":
            return self._conv_forward(x, self.weight, self.bias)
        assert not isinstance(self.padding, str)
        tensors = [x.flatten(2).transpose(1, 2), self.weight, self.bias]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if m is None else m.to(dtype) for m in tensors]
        grid, window = x.shape[2:], (self.stride, self.padding, self.dilation)
        y = torch.ops.vision_ssm.convolution(*tensors, grid, *window, self.groups)
        return _map(y, _grid_after(self.weight, grid, *window))


@register_notrace_module
class Conv1d(_Convolution, nn.Conv1d):
    """``nn.Conv1d`` with padding given as numbers."""


@register_notrace_module
class Conv2d(_Convolution, nn.Conv2d):
    """``nn.Conv2d`` with padding given as numbers."""


@register_notrace_module
class Conv3d(_Convolution, nn.Conv3d):
    """``nn.Conv3d`` with padding given as numbers."""
