"""The formats of a file: how each is written, and read back."""

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

__all__ = ["FORMATS"]

SUBJECT_FILE = "vision_ssm.json"


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
