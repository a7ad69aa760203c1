"""A trained model as one file that runs without this package: torch.export, AOTInductor, ONNX or TorchScript.

The operators of state-space models are decomposed into PyTorch's own first (``vision_ssm.kernels.decompositions``). A
file gets its name after it was read back and computed what the model does, on sizes that its exporter never saw.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbols
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from vision_ssm._version import __version__
from vision_ssm.engine.checkpoint import load_into, make_writable, read_state, write_atomically
from vision_ssm.engine.config import build, config_name
from vision_ssm.kernels.decompositions import decompositions
from vision_ssm.model_zoo import checkpoints

__all__ = ["FORMATS", "Exported", "Subject", "backbone", "export", "network", "plain", "trace"]

SUBJECT_FILE = "vision_ssm.json"
EXAMPLE = (97, 83, 71)
"""Sides of the image that is traced: multiples of nothing, so that no size is taken for a coincidence of others."""
TOLERANCE = 1e-3
"""Of what a file computes, against the model; relative to its largest output."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to export and what its file says of it.

    Attributes:
        net: in evaluation mode, on the CPU.
        name: of the model or config.
        channels: of its input.
        sizes: of its input, such as height and width, where they are fixed.
        classes: names of the outputs, or how many there are.
        mean, std: of each channel, with which images were normalised; empty if a config prepares them otherwise.
        weights: where they are from.
    """

    net: nn.Module
    name: str
    channels: int
    sizes: tuple[int, ...]
    classes: tuple[str, ...] | int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights: str


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of a model.

    Attributes:
        path: the file.
        scans: operators of state-space models in the program, before they were decomposed.
        nodes: operators of the plain program.
        error: greatest difference from the model, relative to its largest output.
        checked: shapes of the inputs that it was measured on.
    """

    path: Path
    scans: int
    nodes: int
    error: float
    checked: tuple[tuple[int, ...], ...]


def backbone(name: str, checkpoint: Path | None, sizes: Sequence[int] = (), **options: Any) -> Subject:
    """A registered backbone with the weights of a file; random ones for None.

    Args:
        sizes: height and width; those of its configuration by default.
        **options: arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError, ValueError: unknown model, or the file is missing, damaged or of another model.
    """
    checkpoints.require_own(name)
    net: Any  # has what timm gives every model
    if checkpoint is None:
        net = stirred(timm.create_model(name, **options))
    else:
        state = checkpoints.read(checkpoint)
        net = timm.create_model(name, **{"num_classes": checkpoints.classes(state, name), **options})
        checkpoints.load(net, state)
    config = net.pretrained_cfg
    return Subject(
        net=net.eval(),
        name=name,
        channels=net.in_chans,
        sizes=tuple(sizes) or tuple(config["input_size"][1:]),
        classes=net.num_classes,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        weights="random" if checkpoint is None else checkpoint.name,
    )


def network(config: Config, checkpoint: Path | None, sizes: Sequence[int] = ()) -> Subject:
    """The network of a config with the weights of a file; random ones for None.

    Args:
        sizes: of the input, one for each axis; those of the config's windows by default.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or of another model, or there is no size.
    """
    net = build(config.model).net
    if checkpoint is None:
        stirred(net)
    else:
        load_into(net, read_state(checkpoint), checkpoint)
    about = config.model.net
    channels = about.get("in_channels", about.get("in_chans"))
    sizes = tuple(sizes) or tuple(config.model.get("inferer", {}).get("roi_size", ()))
    if not sizes or channels is None:
        raise ValueError(f"config {config_name(config)} does not say what its network takes; give --size, one an axis")
    return Subject(
        net=net.eval(),
        name=config_name(config),
        channels=channels,
        sizes=sizes,
        classes=tuple(config.get("classes", ())),
        weights="random" if checkpoint is None else checkpoint.name,
    )


@torch.no_grad()
def stirred(net: nn.Module) -> nn.Module:
    """A net with noise in its weights: what scans add to a map is little at first, and an error in it would be lost."""
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def export(subject: Subject, path: Path, to: str, sides: tuple[int, int] | None = None) -> Exported:
    """Writes a model in the format ``to``, reads it back and measures it; then the file gets its name.

    Args:
        path: new file; one that is there is replaced.
        to: a name in ``FORMATS``.
        sides: least and greatest side of the images, whose batch is free then too; None for one image of
            ``subject.sizes``.

    Raises:
        ValueError: unknown format, a file that ends otherwise, sides that are none, or a format or model that takes one
            size only.
        RuntimeError: the file does not compute what the model does.
        ImportError: a library that the format needs is not installed.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; the formats are {', '.join(FORMATS)}")
    if sides is not None and to == "torchscript":
        raise ValueError("a trace of TorchScript is for one size; export it with --fixed, or to pt2, aoti or onnx")
    if sides is not None and not 0 < sides[0] < sides[1]:
        raise ValueError(f"sides must be two, the least and a greater one; got {sides}")
    suffix, write, read = FORMATS[to]
    if path.suffix != suffix:
        raise ValueError(f"a file of the format {to} must end in {suffix}; got {path}")
    make_writable(path.parent)
    traced = trace(subject, sides)
    program = plain(traced)
    if sides is not None:
        _allow(program, sides)
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
        checked=shapes,
    )


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
    image = torch.zeros(2, subject.channels, *(min(max(side, low + 1), high) for side in EXAMPLE[:axes]))
    with torch.no_grad(), general_sizes():
        return torch.export.export(subject.net, (image,), dynamic_shapes=(shapes,), strict=False)


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


def _allow(program: ExportedProgram, sides: tuple[int, int]) -> None:
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
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    wanted, found = net(image), run(image)
    if found.shape != wanted.shape:
        raise RuntimeError(f"the file gives {tuple(found.shape)} for {tuple(shape)}, the model {tuple(wanted.shape)}")
    return float((found - wanted).abs().max() / wanted.abs().max())


def metadata(subject: Subject, sides: tuple[int, int] | None) -> str:
    """What a file says of itself, as JSON."""
    sizes: dict[str, Any] = {"sizes": list(subject.sizes)} if sides is None else {"sides": list(sides)}
    return json.dumps(
        {
            "model": subject.name,
            "weights": subject.weights,
            "package": f"vision_ssm {__version__}",
            "torch": str(torch.__version__),
            "input": {"channels": subject.channels, "axes": len(subject.sizes), **sizes},
            "mean": subject.mean,
            "std": subject.std,
            "classes": subject.classes,
        }
    )


def _write_pt2(program: ExportedProgram, about: str, path: Path) -> None:
    torch.export.save(program, path, extra_files={SUBJECT_FILE: about})


def _read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_aoti(program: ExportedProgram, about: str, path: Path) -> None:
    configs = {"aot_inductor.metadata": {SUBJECT_FILE: about}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def _read_aoti(path: Path) -> Callable[[Tensor], Tensor]:
    return torch._inductor.aoti_load_package(str(path))


def _write_onnx(program: ExportedProgram, about: str, path: Path) -> None:
    _require("onnx", "onnxscript", "onnxruntime")
    written = torch.onnx.export(program, dynamo=True, input_names=["image"], output_names=["output"], verbose=False)
    assert written is not None
    written.model.metadata_props[SUBJECT_FILE] = about
    written.save(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


class OneShape(nn.Module):
    """A trace, which would compute something else for any shape but its own and not say so."""

    def __init__(self, trace: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.trace = trace
        self.shape = list(shape)

    def forward(self, image: Tensor) -> Tensor:
        if list(image.shape) != self.shape:
            raise ValueError(f"this trace is for images of shape {self.shape}; got {list(image.shape)}")
        return self.trace(image)


def _write_torchscript(program: ExportedProgram, about: str, path: Path) -> None:
    (image,), _ = program.example_inputs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # TorchScript is deprecated, and a trace takes sizes for constants, as it should
        trace = torch.jit.trace(program.module(), image, check_trace=False)
        script = torch.jit.script(OneShape(trace, image.shape))
    script.save(str(path), _extra_files={SUBJECT_FILE: about})


def _read_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        return torch.jit.load(path)


def _require(*modules: str) -> None:
    missing = [name for name in modules if not find_spec(name)]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; pip install 'vision-ssm[export]'")


class Format(NamedTuple):
    """How a file ends, how it is written and how it is read back."""

    suffix: str
    write: Callable[[ExportedProgram, str, Path], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]


FORMATS = {
    "pt2": Format(".pt2", _write_pt2, _read_pt2),
    "aoti": Format(".pt2", _write_aoti, _read_aoti),
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
    "torchscript": Format(".ts", _write_torchscript, _read_torchscript),
}
