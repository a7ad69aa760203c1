"""Checkpoints of other projects to our layout: one module per family, tables and pure functions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")
WEIGHTS = "model", "state_dict"
AVERAGES = "model_ema", "state_dict_ema"
"""Names under which training scripts keep the weights, and their moving average."""

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def taken(source: Mapping[str, Any]) -> str | None:
    """Under which name a checkpoint keeps its weights, or a moving average alone; None for a bare state dict."""
    return next((name for name in (*WEIGHTS, *AVERAGES) if isinstance(source.get(name), Mapping)), None)


def unwrapped(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a checkpoint, or the checkpoint itself.

    "module." before all keys, which data-parallel training leaves there once or twice, is taken off.
    """
    name = taken(source)
    state = source if name is None else source[name]
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
