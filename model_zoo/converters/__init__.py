"""Checkpoints of other projects to our layout: one module per family, tables and pure functions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")
Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def unwrapped(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a checkpoint: the one under "model", else under "state_dict", else the checkpoint itself.

    A moving average that stands beside them is not taken. "module." before all keys, which data-parallel training
    leaves there once or twice, is taken off.
    """
    named = (source.get(name) for name in ("model", "state_dict"))
    state = next((found for found in named if isinstance(found, Mapping)), source)
    while state and all(isinstance(key, str) and key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def rename_keys(source: Mapping[str, Value], renames: Sequence[Rename]) -> dict[str, Value]:
    """Applies the regular expressions ``renames`` in order to every key, each with a replacement as of ``re.sub``.

    Raises:
        ValueError: two keys end up with the same name.
    """
    renamed: dict[str, Value] = {}
    origin: dict[str, str] = {}
    for key, value in source.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(
                f"the keys {origin[name]!r} and {key!r} both mean {name!r}; the checkpoint mixes two layouts"
            )
        renamed[name], origin[name] = value, key
    return renamed
