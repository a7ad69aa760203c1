"""A trained model as one file that runs without this package: torch.export, AOTInductor, ONNX or TorchScript.

The operators of state-space models are decomposed into PyTorch's own first (``vision_ssm.kernels.decompositions``). A
file gets its name after it was read back and computed what the model does, on sizes that its exporter never saw.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_ssm.engine.checkpoint import make_writable, write_atomically
from vision_ssm.engine.export.formats import FORMATS
from vision_ssm.engine.export.program import allow, operators, plain, trace
from vision_ssm.engine.export.subject import Subject, metadata

__all__ = ["Exported", "export"]

TOLERANCE = 1e-3
"""Of what a file computes, against the model; relative to its largest output."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of a model.

    Attributes:
        path: the file.
        scans: operators of state-space models in the program, before they were decomposed.
        nodes: operators of the plain program.
        error: greatest difference from the model, relative to its largest output.
        sides: least and greatest side of its images; None if it takes one size.
        checked: shapes of the inputs that it was measured on.
    """

    path: Path
    scans: int
    nodes: int
    error: float
    sides: tuple[int, int] | None
    checked: tuple[tuple[int, ...], ...]


def export(subject: Subject, path: Path, to: str, sides: tuple[int, int] | None = None) -> Exported:
    """Writes a model in the format ``to``, reads it back and measures it; then the file gets its name.

    Args:
        path: new file; one that is there is replaced.
        to: a name in ``FORMATS``.
        sides: least and greatest side of the images, whose batch is free then too; None for one image of
            ``subject.sizes``.

    Raises:
        ValueError: unknown format, a file that ends otherwise, sides that are none or less than the model's least, or a
            format or model that takes one size only.
        RuntimeError: the file does not compute what the model does.
        ImportError: a library that the format needs is not installed.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; the formats are {', '.join(FORMATS)}")
    if sides is not None and to == "torchscript":
        raise ValueError("a trace of TorchScript is for one size; export it with --fixed, or to pt2, aoti or onnx")
    if sides is not None and not 0 < sides[0] < sides[1]:
        raise ValueError(f"sides must be two, the least and a greater one; got {sides}")
    if sides is not None and sides[0] < subject.least:
        raise ValueError(
            f"{subject.name} pads images below {subject.least} pixels by another rule, which a program for many sizes "
            f"has not; let its sides begin at {subject.least}, or export it with --fixed; got {sides}"
        )
    suffix, write, read = FORMATS[to]
    if path.suffix != suffix:
        raise ValueError(f"a file of the format {to} must end in {suffix}; got {path}")
    make_writable(path.parent)
    traced = trace(subject, sides)
    program = plain(traced)
    if sides is not None:
        allow(program, sides)
    shapes = tuple(unseen(subject, sides))
    errors: list[float] = []

    def fill(partial: Path) -> None:
        write(program, metadata(subject, sides), partial)
        run = read(partial)
        for shape in shapes:
            errors.append(deviation(subject.net, run, shape))
            if not errors[-1] <= TOLERANCE:  # NaN neither
                raise RuntimeError(f"{to} of {subject.name} is off by {errors[-1]:.2g} at {shape}; nothing was written")

    write_atomically(path, fill)
    return Exported(
        path=path,
        scans=sum(count for name, count in operators(traced).items() if name.startswith("vision_ssm")),
        nodes=operators(program).total(),
        error=max(errors),
        sides=sides,
        checked=shapes,
    )


def unseen(subject: Subject, sides: tuple[int, int] | None) -> Iterator[tuple[int, ...]]:
    """Shapes to measure on: the one there is, or the smallest, an odd one and a larger one."""
    if sides is None:
        yield 1, subject.channels, *subject.sizes
        return
    low, high = sides
    axes = range(len(subject.sizes))
    yield 1, subject.channels, *(low for _ in axes)
    yield 3, subject.channels, *(min(high, low + 13 + 24 * axis) for axis in axes)
    yield 1, subject.channels, *(min(high, 4 * low) for _ in axes)


@torch.no_grad()
def deviation(net: nn.Module, run: Callable[[Tensor], Tensor], shape: Sequence[int]) -> float:
    """Largest difference from the net's output on random images of ``shape``, relative to the largest output."""
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    wanted, found = net(image), run(image)
    if found.shape != wanted.shape:
        raise RuntimeError(f"the file gives {tuple(found.shape)} for {tuple(shape)}, the model {tuple(wanted.shape)}")
    size = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)  # a net may give zeros alone
    return float((found - wanted).abs().max() / size)
