"""The program of a model, in PyTorch's own operators and for images of many sizes."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbols
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from vision_ssm.engine.export.subject import Subject
from vision_ssm.kernels.decompositions import decompositions

__all__ = ["plain", "trace"]

EXAMPLE = (97, 83, 71)
"""Sides of the image that is traced: multiples of nothing, so that no size is taken for a coincidence of others."""


def general_sizes() -> AbstractContextManager[None]:
    """Where a program depends on a size, it is written for any, not for those of the example."""
    config: Any = symbols  # torch makes more of the module than types tell
    return config.patch(backed_size_oblivious=True)


def trace(subject: Subject, sides: tuple[int, int] | None) -> ExportedProgram:
    """The program of a model, for images of one size or of all between two sides."""
    if sides is None:
        with torch.no_grad():
            return torch.export.export(subject.net, (torch.zeros(1, subject.channels, *subject.sizes),), strict=False)
    low, high = sides
    axes = len(subject.sizes)
    shapes = {0: Dim.DYNAMIC(min=1), **{axis + 2: Dim.DYNAMIC(min=low, max=high) for axis in range(axes)}}
    image = torch.zeros(2, subject.channels, *(example(side, low, high) for side in EXAMPLE[:axes]))
    with torch.no_grad(), general_sizes():
        return torch.export.export(subject.net, (image,), dynamic_shapes=(shapes,), strict=False)


def example(side: int, low: int, high: int) -> int:
    """The side of the image that is traced: odd, since a network that pads to whole cells must be seen to pad."""
    side = min(max(side, low + 1), high)
    return side - 1 + side % 2


def plain(program: ExportedProgram) -> ExportedProgram:
    """The same program in PyTorch's own operators.

    Raises:
        ValueError: a scan has no form for more than one size.
    """
    table = {**decompositions(), torch.ops.aten._upsample_bicubic2d_aa.default: bicubic}
    with torch.no_grad(), general_sizes():
        program = program.run_decompositions(table)
    if left := [name for name in operators(program) if name.startswith("vision_ssm")]:
        raise RuntimeError(f"there is no plain form of {', '.join(left)}; the file would need this package")
    return program


def allow(program: ExportedProgram, sides: tuple[int, int]) -> None:
    """Lets a program take any batch, and all sides asked for.

    PyTorch asks whether a side or the batch is 1 when it chooses how to lay out a tensor, and would refuse those later,
    although the operators are the same. What a file computes on such images is measured instead.
    """
    (image,) = program.graph_signature.user_inputs
    (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == image)
    for axis, size in enumerate(shape):
        if not isinstance(size, int):
            program.range_constraints[size.node.expr] = ValueRanges(*(sides if axis else (1, int_oo)))
    program._guards_code = []


def operators(program: ExportedProgram) -> Counter[str]:
    """How many times a program calls each operator."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def bicubic(x: Tensor, size: Sequence[int], align_corners: bool, *scales: float | None) -> Tensor:
    """Bicubic resampling with antialias as two matrix products: (b, c, h, w) -> (b, c, *size)."""
    for axis, wanted in zip((2, 3), size, strict=True):
        given = x.shape[axis]
        scale = given / wanted
        reach = torch.clamp(torch.ones((), device=x.device) * scale, min=1.0)
        centre = (torch.arange(wanted, device=x.device) + 0.5) * scale
        distance = ((torch.arange(given, device=x.device) + 0.5 - centre[:, None]) / reach).abs()
        near = (1.5 * distance - 2.5) * distance**2 + 1  # Keys' kernel with a = -0.5
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        weights = weights / weights.sum(1, keepdim=True)
        x = (x.movedim(axis, -1) @ weights.to(x.dtype).T).movedim(-1, axis)
    return x
