"""Checkpoints of other projects to our layout: one module per family, tables and pure functions."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def rename_keys(source: Mapping[str, Value], renames: Sequence[tuple[str, str]]) -> dict[str, Value]:
    """Applies the regular expressions ``renames`` in order to every key.

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
