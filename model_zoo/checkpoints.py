"""Strict loading of official and own checkpoints: every key lands, or an error lists those that do not."""

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn

from .converters import efficient_vmamba, unwrapped, vim, vmamba

Model = TypeVar("Model", bound=nn.Module)

_CONVERTERS = (vmamba, efficient_vmamba, vim)

_SETTINGS = ("argparse.Namespace", "yacs.config.CfgNode")
"""What training scripts put beside the weights. It is read into an inert dictionary, whether yacs is there or not."""

_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    type(name, (), {"__module__": module, "__new__": lambda cls, *arguments: OrderedDict()})
    for module, _, name in (path.rpartition(".") for path in _SETTINGS)
]

# timm reads the file of ``checkpoint_path`` itself, before our code sees it. It lets argparse's settings through alone.
torch.serialization.add_safe_globals(_STAND_INS[1:])

# What reading raises on bytes that are no checkpoint, or half of one: torch's unpickler lets through what it meets.
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def convert(state_dict: Mapping[str, Any], name: str, **arguments: Any) -> dict[str, Tensor]:
    """An official checkpoint of the model ``name`` in our layout.

    Args:
        state_dict: official state dict, or the dictionary with the key "model" around it.
        name: timm name of the model, such as "vmamba_tiny".
        **arguments: of ``timm.create_model``, for a model that is built otherwise, such as a Vim's ``img_size``.

    Returns:
        Our state dict, complete: it loads strictly. The number of classes is the checkpoint's own.

    Raises:
        ValueError: unknown model or layout, or keys missing, left over or of another shape; all are listed.
    """
    require_own(name)
    ours = _to_ours(state_dict)
    built = {"num_classes": classes(ours, name), **arguments}
    _check(ours, _on_meta(name, **built), name)
    return ours


def load(model: Model, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Model:
    """Loads a checkpoint, in the official layout or ours, strictly.

    Args:
        model: the model to fill.
        checkpoint: a ``.safetensors`` or PyTorch file, or a state dict.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or keys are missing, left over or of another shape; all are listed. The
            model is then unchanged.
    """
    source = checkpoint if isinstance(checkpoint, Mapping) else read(Path(checkpoint))
    ours = _to_ours(source)
    _check(ours, model, type(model).__name__)
    model.load_state_dict(ours, strict=True)
    return model


def identify(state_dict: Mapping[str, Any]) -> str:
    """Name of the model that a checkpoint fits, whatever its classes; no two models of the package share their shapes.

    Raises:
        ValueError: it fits none.
    """
    ours = _to_ours(state_dict)
    for name in _own_models():
        if not misfits(ours, _shapes(name, classes(ours, name))):
            return name
    raise ValueError("the checkpoint fits no model of this package; name the one that you expect to see what differs")


def require_own(name: str) -> None:
    """Raises ValueError unless ``name`` is a model of this package."""
    if not _is_own(name):
        known = ", ".join(_own_models())
        raise ValueError(f"unknown model {name!r}; the models of this package are {known}")


def classes(state_dict: Mapping[str, Tensor], name: str) -> int:
    """Classes of the classifier that a state dict in our layout has for the model ``name``; 0 without one."""
    weight = state_dict.get(f"{get_pretrained_cfg_value(name, 'classifier')}.weight")
    return weight.shape[0] if weight is not None and weight.dim() else 0


def input_size(name: str) -> tuple[int, ...]:
    """Channels, height and width of the images that the model ``name`` was trained on, or is meant for."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None  # every model of the package has one
    return config.input_size


def _on_meta(name: str, **arguments: Any) -> nn.Module:
    """The model ``name`` without storage."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@cache
def _shapes(name: str, num_classes: int) -> nn.Module:
    return _on_meta(name, num_classes=num_classes)


def _own_models() -> list[str]:
    return [name for name in timm.list_models() if _is_own(name)]


def _is_own(name: str) -> bool:
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vision_ssm.")


def read(path: Path) -> Mapping[str, Any]:
    """What a ``.safetensors`` or PyTorch file holds, on the CPU; never runs code that the file brings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, no checkpoint, or holds objects beside tensors, built-in types and settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_STAND_INS[:1]):
            source = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(source, Mapping):
        raise ValueError(f"{path} holds a {type(source).__name__}; a state dict or a dictionary around one is accepted")
    return source


def _reason(error: Exception) -> str:
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        accepted = ", ".join(_SETTINGS)
        return f"it holds {refused[1]}, which could run code; beside tensors and built-in types {accepted} are accepted"
    return f"{str(error).partition(chr(10))[0] or type(error).__name__}. It may be truncated, or another kind of file"


def is_official(source: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is laid out as one of the official projects does."""
    return any(family.is_official(source) for family in _CONVERTERS)


def to_ours(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """An official state dict in our layout, not checked against a model; any other mapping as it is."""
    return _to_ours(source) if is_official(source) else source


def _to_ours(source: Mapping[str, Any]) -> dict[str, Tensor]:
    items = unwrapped(source).items()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    for family in _CONVERTERS:
        if family.is_official(tensors):
            return family.convert(tensors)
    return tensors


def misfits(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[str]]:
    """What keeps a state dict from loading strictly: a list of keys under each complaint that there is."""
    wanted = model.state_dict()
    found = {
        "missing": sorted(wanted.keys() - state_dict.keys()),
        "unexpected": sorted(state_dict.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)}, not {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ],
    }
    return {complaint: keys for complaint, keys in found.items() if keys}


def _check(state_dict: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    if found := misfits(state_dict, model):
        lines = (f"{len(keys)} {complaint}: {', '.join(keys)}" for complaint, keys in found.items())
        raise ValueError(f"the checkpoint does not fit {name}.\n" + "\n".join(lines))
