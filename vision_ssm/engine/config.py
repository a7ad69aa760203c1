"""Configs: pure-Python mmengine files found by path or by name, checked for misspelt keys, and built into objects.

A dictionary with the key ``type`` describes an object: the callable and its keyword arguments. ``build`` turns a tree
of such dictionaries into objects, innermost first, so tasks, datasets and metrics receive ready modules and know
nothing of configs.

Reading a config runs it, and an override may name any callable. ``load_config(..., safe=True)`` is for names and
overrides that somebody else wrote: it reads configs of the package alone, and changes plain data alone.
"""

import ast
import difflib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import DataLoader

__all__ = ["build", "config_name", "config_names", "load_config", "settings"]

OWN_KEYS = frozenset(
    {
        "classes",
        "data_root",
        "entrants",
        "frame_size",
        "modalities",
        "model_wrapper_cfg",
        "notes",
        "prepare",
        "regions",
        "score",
    }
)
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


def load_config(name: str, overrides: Sequence[str] = (), *, safe: bool = False) -> Config:
    """Reads a config and applies ``KEY=VALUE`` overrides; dots in KEY lead into nested entries.

    An override of ``data_root`` is one of every entry ``root`` that the file gave the same value.

    Args:
        name: path of a config file, or a name listed by ``config_names``.
        overrides: such as ``train_cfg.max_iters=100``; values are Python literals, else strings.
        safe: accept names of the package's configs alone, and overrides of plain data: literals or words in place of
            numbers, strings, truth values and lists of them, and further arguments of that kind. Files, callables
            (``type``), expressions and mmengine's own keys (``_delete_``, ``_base_``, ``custom_imports``) are refused.

    Raises:
        FileNotFoundError: neither a file nor a name.
        ValueError: an override has no ``=``, a key is unknown, the classes do not fit the network, its labels or its
            metrics, or ``safe`` does not accept it.
    """
    config = Config.fromfile(named_config(name) if safe else find_config(name))
    changes = dict(parse_override(override) for override in overrides)
    for key, value in changes.items():
        if safe:
            check_plain(key, value)
        check_parent(config, key)
        if safe:
            check_place(settings(config), key, value)
    written = config.get("data_root")
    config.merge_from_dict(changes)
    if "data_root" in changes:
        for _, node in described(settings(config), ""):
            if "root" in node and node["root"] == written:
                node["root"] = changes["data_root"]
    check_keys(config)
    check_classes(config)
    return config


def find_config(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    return named_config(name, otherwise="the path of a .py file or ")


def named_config(name: str, otherwise: str = "") -> Path:
    """The file of a config of the package."""
    known = config_names()
    if name.removesuffix(".py") in known:
        return config_root() / f"{name.removesuffix('.py')}.py"
    raise FileNotFoundError(f"no config {name!r}; give {otherwise}one of: {', '.join(known)}")


def parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise ValueError(f"override {override!r} is not KEY=VALUE; write for example train_cfg.max_iters=100")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def check_parent(config: Config, key: str) -> None:
    """Raises ValueError unless all entries on the way to an overridden key exist, and the last one if it is an item."""
    node: Any = settings(config)
    parts = key.split(".")
    for position, part in enumerate(parts, start=1):
        if isinstance(node, (list, tuple)) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and (part in node or position == len(parts)):
            node = node.get(part)
        else:
            known = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, (list, tuple)) else ()
            raise unknown_key(part, f"override {key!r}", [str(name) for name in known])


def check_plain(key: str, value: Any) -> None:
    """Raises ValueError unless an override is plain data under plain keys; see ``load_config``."""
    for part in key.split("."):
        if part == "type" or part.startswith("_") or not re.fullmatch(r"\w+", part):
            raise refused(key, f"the key {part!r} could bring code")
    if isinstance(value, Mapping):
        for inner, content in value.items():
            check_plain(f"{key}.{inner}", content)
    elif isinstance(value, (list, tuple)):
        for index, content in enumerate(value):
            check_plain(f"{key}.{index}", content)
    elif isinstance(value, str) and not re.fullmatch(r"[\w ./\\:~-]*", value):
        raise refused(key, f"{value!r} is neither a literal nor a plain word or path")
    elif not is_plain(value):
        raise refused(key, f"{value!r} is no number, string, truth value, list or dictionary")


def check_place(node: Any, key: str, value: Any, path: str = "") -> None:
    """Raises ValueError unless an override stands where plain data stand, or is an argument that may be added."""
    part, _, rest = key.partition(".")
    here = f"{path}.{part}" if path else part
    entry: Any = int(part) if isinstance(node, (list, tuple)) else part
    if not isinstance(node, (list, tuple)) and part not in node:
        if not path and part not in OWN_KEYS | {"launcher"}:
            raise refused(here, "the config has no such entry")
        if path and not takes_by_name(DataLoader if path in DATA_LOADERS else node.get("type"), part):
            raise refused(here, "it is no entry of the config, nor an argument that is known by name")
    elif rest:
        check_place(node[entry], rest, value, here)
    elif isinstance(value, Mapping) and isinstance(node[entry], Mapping):
        for inner, content in value.items():
            check_place(node[entry], inner, content, here)
    elif value is not None and not is_plain(node[entry]):
        raise refused(here, "it describes an object; change its arguments, or set it to None")


def takes_by_name(target: Any, argument: str) -> bool:
    """Whether a described object has this argument, or is one of ours that hands further arguments on."""
    function = resolve(target) if isinstance(target, str) else target
    if not callable(function):
        return False
    known = inspect.signature(function).parameters
    if argument in known:
        return known[argument].kind is not inspect.Parameter.VAR_KEYWORD
    further = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    return further and function.__module__.startswith("vision_ssm.")


def is_plain(value: Any) -> bool:
    """Whether a value is data through and through: no callable, no description of an object."""
    if isinstance(value, Mapping):
        return "type" not in value and all(is_plain(content) for content in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(content) for content in value)
    return value is None or isinstance(value, (bool, int, float, str))


def refused(key: str, reason: str) -> ValueError:
    return ValueError(
        f"--safe refuses {key}: {reason}. It accepts plain data, such as train_cfg.max_iters=100 or data_root=FOLDER; "
        "leave --safe out only for a config and overrides that you trust"
    )


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


def check_classes(config: Config) -> None:
    """Raises ValueError unless the network's ``out_channels``, the labels and the metrics have the config's classes.

    A network for segmentation has an output for each of ``classes`` and one for background, which they do not name.
    """
    entries = settings(config)
    if "classes" not in entries:
        return
    nodes = list(described(entries, ""))
    counts = {f"{path}.out_channels": outputs(node) for path, node in nodes if re.fullmatch(r"model(\.net)+", path)}
    if not any(counts.values()):
        return
    for path, node in nodes:
        if not path.startswith("model"):
            counts |= {f"{path}.classes": label_values(node), f"{path}.structures": structures(node)}
    expected = len(entries["classes"]) + 1
    if wrong := {place: count for place, count in counts.items() if count not in (None, expected)}:
        found = ", ".join(f"{place} is for {count}" for place, count in wrong.items())
        raise ValueError(
            f"the config has {expected} classes (background, {', '.join(entries['classes'])}), but {found}, background "
            "included; change that, or classes"
        )


def outputs(node: Mapping[str, Any]) -> int | None:
    """The ``out_channels`` of a described network, its default if none are given; None if it takes no such argument."""
    if "out_channels" in node or "out_channels" not in parameters(node["type"]):
        return node.get("out_channels")
    default = inspect.signature(resolve(node["type"])).parameters["out_channels"].default
    return default if isinstance(default, int) else None


def label_values(node: Mapping[str, Any]) -> int | None:
    """How many classes, with background, what reads label maps tells apart; None if it reads none."""
    values = node.get("classes")
    if isinstance(values, (list, tuple)) and not any(isinstance(one, str) for one in values):
        return len(values)
    return values if isinstance(values, int) else None


def structures(node: Mapping[str, Any]) -> int | None:
    """How many classes, with background, a metric expects; None if it is of something else."""
    return len(node["structures"]) + 1 if "structures" in node else None


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
