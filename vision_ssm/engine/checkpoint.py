"""Checkpoints that are never half-written, never run code when read, and never load into another model.

The Runner's checkpoints hold tensors and built-in types alone, so ``torch.load(weights_only=True)`` reads them with no
allow-list; published weights are safetensors with metadata.
"""

import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vision_ssm._version import __version__
from vision_ssm.model_zoo.checkpoints import UNREADABLE, misfits

__all__ = [
    "find_checkpoint",
    "load_into",
    "make_writable",
    "publish",
    "read_checkpoint",
    "read_state",
    "require_fit",
    "save_weights",
    "write_atomically",
    "write_json",
]

PARTIAL = ".partial-"  # begins the names of files that are not complete


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path``, flushes it to the disk and renames it: all of it or nothing."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Gives a file that is on the disk its name, on the disk as well."""
    partial.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened; its entries are the file system's care
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_writable(folder: Path) -> None:
    """Makes a folder if need be; raises PermissionError, before any work is done, if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}); choose another folder") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole; numbers that JSON cannot hold, such as an infinite distance, become null."""
    text = json.dumps(finite(content), indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def find_checkpoint(folder: Path, which: str) -> Path:
    """The Runner's checkpoint that a run continues from.

    Args:
        folder: of the run.
        which: "latest", the one with the highest step; "previous", the one before that; or a path.

    Raises:
        FileNotFoundError: there is none.
    """
    if which not in ("latest", "previous"):
        require_file(Path(which))
        return Path(which)
    steps = {path.stem.removeprefix("iter_"): path for path in folder.glob("iter_*.pth")}
    found = [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)]  # a copy has another name
    if not found:
        raise FileNotFoundError(f"no checkpoint iter_N.pth in {folder}, so nothing to resume; start without --resume")
    if which == "latest":
        return found[-1]
    if len(found) == 1:
        raise FileNotFoundError(f"{found[0]} is the only checkpoint in {folder}; there is none before it")
    return found[-2]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Runner checkpoint, on the CPU.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is truncated, holds code, or is no such checkpoint.
    """
    require_file(path)
    try:
        if is_zipfile(path) and (damaged := ZipFile(path).testzip()):
            raise ValueError(f"{damaged} was changed after it was written")  # torch.load compares no checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, BadZipFile) as error:
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to read it unsafely
            reason = "it holds more than tensors and built-in types, or is another kind of file"
        else:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is truncated or no checkpoint ({reason}); use an earlier one, as --resume previous does"
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and torch.is_tensor(m) for key, m in state.items()
    ):
        raise ValueError(
            f"{path} has no state_dict of tensors; give a checkpoint that `vision-ssm train` wrote, or .safetensors"
        )
    return dict(checkpoint)


def read_state(path: Path) -> dict[str, Tensor]:
    """Weights of the network in a Runner checkpoint (.pth) or in published weights (.safetensors).

    Raises:
        FileNotFoundError, ValueError: see ``read_checkpoint``.
    """
    if path.suffix != ".safetensors":
        state = read_checkpoint(path)["state_dict"]
        return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    require_file(path)
    try:
        with safe_open(path, framework="pt") as weights:
            return {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error


def require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}. Give a .pth or .safetensors file")


def require_fit(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Raises ValueError unless every key and shape of ``state`` is the module's."""
    if found := misfits(state, module):
        listed = "; ".join(f"{len(keys)} {complaint} (e.g. {keys[0]})" for complaint, keys in found.items())
        raise ValueError(f"{source} holds the weights of another model: {listed}. Use the config it was trained with")


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Strictly loads ``state``; nothing is changed unless every key and shape fits.

    Raises:
        ValueError: the weights belong to another model.
    """
    require_fit(module, state, source)
    module.load_state_dict(dict(state))


def save_weights(path: Path, net: nn.Module, *, config: str, classes: tuple[str, ...], channels: int) -> None:
    """Publishes a network's weights as safetensors.

    Args:
        config: name of the config that builds the network.
        classes: names of the output classes, background excluded for segmentation.
        channels: channels of the input.
    """
    metadata = {
        "format": "pt",
        "package": "vision_ssm",
        "version": __version__,
        "config": config,
        "classes": json.dumps(classes),
        "input_channels": str(channels),
        "parameters": str(sum(parameter.numel() for parameter in net.parameters())),
    }
    # Copies: some networks, MONAI's DynUNet among them, hold a tensor under two names, and safetensors refuses that.
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    write_atomically(path, lambda partial: partial.write_bytes(save(state, metadata=metadata)))
