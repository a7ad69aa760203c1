"""The volumes of each class in millilitres, as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.engine.checkpoint import write_atomically

__all__ = ["COLUMNS", "volumes", "write_volumes"]

COLUMNS = ("case", "class", "label", "voxels", "millilitres")


Rows = dict[str, list[dict[str, Any]]]  # case -> one row a class


def volumes(case: str, labels: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class of a label map: its voxels and millilitres."""
    millilitres = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
    counts = np.bincount(np.asarray(labels.dataobj).ravel(), minlength=len(classes) + 1)
    numbers = ((case, name, label, int(counts[label])) for label, name in enumerate(classes, start=1))
    return [dict(zip(COLUMNS, (*row, f"{row[3] * millilitres:.6g}"), strict=True)) for row in numbers]


def write_volumes(path: Path, rows: Rows, columns: Sequence[str]) -> None:
    """Writes the table whole, by case."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(row for _, case in sorted(rows.items()) for row in case)

    write_atomically(path, write)


def read_volumes(path: Path, columns: Sequence[str]) -> Rows:
    """A table that ``write_volumes`` wrote; of cases whose label maps are gone, nothing is kept.

    Raises:
        ValueError: it has other columns.
    """
    rows: Rows = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if (found := tuple(table.fieldnames or ())) != tuple(columns):
                raise ValueError(
                    f"{path} has the columns {', '.join(found) or 'of an empty file'}, here they are "
                    f"{', '.join(columns)}; choose another folder"
                )
            for row in table:
                if (path.parent / f"{row['case']}.nii.gz").exists():
                    rows.setdefault(row["case"], []).append(dict(row))
    return rows
