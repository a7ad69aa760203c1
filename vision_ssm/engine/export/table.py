"""Rows of models that were exported, beside a document, and the table in it that is rendered from them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.export.file import Exported
from vision_ssm.engine.export.subject import Subject

__all__ = ["filled", "record", "render"]

_BLOCK = re.compile(r"(?P<head><!-- exported -->\n).*?(?P<tail><!-- /exported -->)", re.DOTALL)


def record(document: Path, subject: Subject, to: str, done: Exported) -> None:
    """Keeps a row in the .jsonl file beside ``document``, in place of one of the same kind, and renders its table.

    Raises:
        FileNotFoundError, ValueError: there is no such document, or it has no block to fill.
    """
    row = {
        "model": subject.name,
        "to": to,
        "parameters": sum(parameter.numel() for parameter in subject.net.parameters()),
        "scans": done.scans,
        "operators": done.nodes,
        "sides": done.sides,
        "mib": done.path.stat().st_size / 2**20,
        "checked": done.checked,
        "error": done.error,
        "torch": str(torch.__version__),
    }
    filled(document)
    rows = [*(old for old in read(document) if _key(old) != _key(row)), row]
    rows.sort(key=_key)
    lines = "".join(f"{json.dumps(each)}\n" for each in rows)
    write_atomically(rows_of(document), lambda partial: partial.write_text(lines))
    text = filled(document)
    write_atomically(document, lambda partial: partial.write_text(text, encoding="utf-8"))


def _key(row: Mapping[str, Any]) -> tuple[bool, str, str]:
    """What a document holds one row of."""
    return row["sides"] is not None, row["to"], row["model"]


def rows_of(document: Path) -> Path:
    return document.with_suffix(".jsonl")


def read(document: Path) -> list[dict[str, Any]]:
    """The rows beside a document; none where there is no file yet."""
    path = rows_of(document)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def filled(document: Path) -> str:
    """Text of ``document`` with its block ``<!-- exported -->`` rendered anew.

    Raises:
        FileNotFoundError, ValueError: there is no such document, or it has no such block.
    """
    text = document.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise ValueError(f"{document} has no block <!-- exported --> ... <!-- /exported --> to fill")
    return _BLOCK.sub(lambda block: f"{block['head']}\n{render(read(document))}\n\n{block['tail']}", text)


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: a line for each row."""
    lines = [
        "| model | format | sides | parameters (M) | scans | operators | file, MiB "
        "| measured on | greatest error | torch |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for row in rows:
        shapes = ", ".join("x".join(map(str, shape)) for shape in row["checked"])
        sides = "fixed" if row["sides"] is None else "{} to {}".format(*row["sides"])
        lines.append(
            f"| `{row['model']}` | {row['to']} | {sides} | {row['parameters'] / 1e6:.2f} | {row['scans']} "
            f"| {row['operators']} | {row['mib']:.1f} | {shapes} | {row['error']:.1e} | {row['torch']} |"
        )
    return "\n".join(lines)
