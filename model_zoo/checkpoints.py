"""Strict loading of official and own checkpoints: every key lands, or an error lists those that do not."""

import pickle
from collections.abc import Mapping
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


def convert(state_dict: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """An official checkpoint of the model ``name`` in our layout.

    Args:
        state_dict: official state dict, or the dictionary with the key "model" around it.
        name: timm name of the model, such as "vmamba_tiny".

    Returns:
        Our state dict, complete: it loads strictly. The number of classes is the checkpoint's own.

    Raises:
        ValueError: unknown model or layout, or keys missing, left over or of another shape; all are listed.
    """
    if not _is_own(name):
        known = ", ".join(_own_models())
        raise ValueError(f"unknown model {name!r}; the models of this package are {known}")
    ours = _to_ours(state_dict)
    classifier = f"{get_pretrained_cfg_value(name, 'classifier')}.weight"
    classes = ours[classifier].shape[0] if classifier in ours else 0
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    _check(ours, model, name)
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
    source = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    ours = _to_ours(source)
    _check(ours, model, type(model).__name__)
    model.load_state_dict(ours, strict=True)
    return model


def _own_models() -> list[str]:
    return [name for name in timm.list_models() if _is_own(name)]


def _is_own(name: str) -> bool:
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vision_ssm.")


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        source = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {error}. It may be truncated, or hold more than tensors"
        ) from error
    if not isinstance(source, Mapping):
        raise ValueError(f"{path} holds a {type(source).__name__}; a state dict or a dictionary around one is accepted")
    return source


def _to_ours(source: Mapping[str, Any]) -> dict[str, Tensor]:
    for family in _CONVERTERS:
        if family.is_official(source):
            return family.convert(source)
    return {key: value for key, value in unwrapped(source).items() if isinstance(value, Tensor)}


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
