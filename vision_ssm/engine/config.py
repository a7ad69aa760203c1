"""Configs: pure-Python mmengine files found by path or by name, checked for misspelt keys, and built into objects.

A dictionary with the key ``type`` describes an object: the callable and its keyword arguments. ``build`` turns a tree
of such dictionaries into objects, innermost first, so tasks, datasets and metrics receive ready modules and know
nothing of configs.
"""

import ast
import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import DataLoader

__all__ = ["build", "config_name", "config_names", "load_config", "settings"]

OWN_KEYS = frozenset({"classes", "data_root", "entrants", "modalities", "notes", "prepare", "regions", "score"})
DATA_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
INJECTED_KEYS = frozenset({"type", "priority", "dataset"})  # read by mmengine itself, whatever the type


def config_names() -> list[str]:
    """Names of the configs in the package, such as ``medical/deep_grey_vmamba_unet``."""
    root = config_root()
    paths = (path.relative_to(root).with_suffix("") for path in root.glob("*/*.py"))
    return sorted(path.as_posix() for path in paths if not any(part.startswith("_") for part in path.parts))


def config_root() -> Path:
    return Path(str(files("vision_ssm.configs")))


def config_name(config: Config) -> str:
    """Name of a config of the package, else the stem of its file."""
    path = Path(config.filename)
    if path.is_relative_to(config_root()):
        return path.relative_to(config_root()).with_suffix("").as_posix()
    return path.stem


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config and applies ``KEY=VALUE`` overrides; dots in KEY lead into nested entries.

    An override of ``data_root`` is one of every entry ``root`` that the file gave the same value.

    Args:
        name: path of a config file, or a name listed by ``config_names``.
        overrides: such as ``train_cfg.max_iters=100``; values are Python literals, else strings.

    Raises:
        FileNotFoundError: neither a file nor a name.
        ValueError: an override has no ``=``, or a key is unknown.
    """
    config = Config.fromfile(find_config(name))
    changes = dict(parse_override(override) for override in overrides)
    for key in changes:
        check_parent(config, key)
    written = config.get("data_root")
    config.merge_from_dict(changes)
    if "data_root" in changes:
        for _, node in described(settings(config), ""):
            if "root" in node and node["root"] == written:
                node["root"] = changes["data_root"]
    check_keys(config)
    return config


def find_config(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    known = config_names()
    if name.removesuffix(".py") in known:
        return config_root() / f"{name.removesuffix('.py')}.py"
    raise FileNotFoundError(f"no config {name!r}; give the path of a .py file or one of: {', '.join(known)}")


def parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise ValueError(f"override {override!r} is not KEY=VALUE; write for example train_cfg.max_iters=100")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def check_parent(config: Config, key: str) -> None:
    """Raises ValueError unless every entry on the way to an overridden key exists."""
    node: Any = settings(config)
    for part in key.split(".")[:-1]:
        if isinstance(node, (list, tuple)) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            known = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, (list, tuple)) else ()
            raise unknown_key(part, f"override {key!r}", [str(name) for name in known])


def check_keys(config: Config) -> None:
    """Raises ValueError at the first key that nothing reads, naming the keys that are known there."""
    known = {*inspect.signature(Runner.__init__).parameters} - {"self", "cfg"} | OWN_KEYS
    entries = settings(config)
    for key in entries:
        if key not in known:
            raise unknown_key(key, "the config", known)
    for path, node in described(entries, ""):
        accepted = parameters(DataLoader if path in DATA_LOADERS else node.get("type"))
        unknown = [key for key in node if accepted and key not in accepted | INJECTED_KEYS]
        if unknown:
            raise unknown_key(unknown[0], path, accepted)


def settings(config: Config) -> dict[str, Any]:
    """The entries of a config without the names that its file imports."""
    return {key: value for key, value in config.items() if not (callable(value) or inspect.ismodule(value))}


def described(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary of a config whose keys are arguments, with the dotted path that leads to it."""
    if isinstance(node, dict):
        if "type" in node or path in DATA_LOADERS:
            yield path, node
        children: Iterable[tuple[Any, Any]] = node.items()
    else:
        children = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        yield from described(child, f"{path}.{key}" if path else str(key))


def parameters(target: Any) -> frozenset[str]:
    """Keyword arguments that a described object takes; empty if it takes any, or is not importable by name."""
    function = resolve(target) if isinstance(target, str) and "." in target else target
    if not callable(function):
        return frozenset()
    known = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return frozenset()
    return frozenset(known)


def unknown_key(key: str, place: str, known: Iterable[str]) -> ValueError:
    close = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return ValueError(f"unknown key {key!r} in {place}{hint} known keys: {', '.join(sorted(known))}")


def build(node: Any) -> Any:
    """Objects described by a config entry; see the module's first lines."""
    if isinstance(node, Mapping):
        arguments = {key: build(value) for key, value in node.items() if key != "type"}
        return resolve(node["type"])(**arguments) if "type" in node else arguments
    if isinstance(node, (list, tuple)):
        return type(node)(build(value) for value in node)
    return node


def resolve(target: str | Callable[..., Any]) -> Callable[..., Any]:
    """The callable itself, or the one a dotted name leads to (a config that was dumped holds names)."""
    return pkgutil.resolve_name(target) if isinstance(target, str) else target
