"""Scores of label maps, by MONAI, for each case and class; their means with bootstrap intervals; and how they are kept.

Empty classes are as in MONAI: one that neither map holds is NaN in every metric, and NaN is left out of the means. One
that the prediction lacks has a Dice and an NSD of 0 and no HD95 (NaN); one that the truth lacks has an NSD of 0, and
neither Dice nor HD95 (NaN). The means come with how often these happened: ``missed`` and ``invented``.
"""
# Shapes: x y z the grid of a volume; m metrics, n cases, c classes without background.

import csv
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from vision_ssm.engine.checkpoint import write_atomically, write_json

__all__ = ["METRICS", "Evaluation", "Summary", "score"]

METRICS = ("dice", "hd95", "nsd")
RESAMPLES = 2000
ACROSS = "mean"  # stands for the mean over a case's classes where a class is named


def score(
    prediction: np.ndarray, truth: np.ndarray, classes: int, *, spacing: Sequence[float], tolerance: float
) -> np.ndarray:
    """Dice, HD95 in mm and NSD of the classes 1 to ``classes``: (m, c), NaN as the module's first lines say.

    Args:
        prediction, truth: classes (x, y, z).
        spacing: millimetres between voxels along x, y and z.
        tolerance: millimetres within which a surface counts as found in NSD.
    """
    scores = np.full((len(METRICS), classes), math.nan)
    for label in range(1, classes + 1):
        pair = cropped(prediction == label, truth == label)
        if pair is None:
            continue
        with warnings.catch_warnings():  # MONAI 1.6 passes its own deprecated argument
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*is all 0")  # the result says so
            options: dict[str, Any] = {"include_background": True, "spacing": tuple(spacing)}
            scores[:, label - 1] = (
                float(compute_dice(*pair)),
                float(compute_hausdorff_distance(*pair, percentile=95, **options)),
                float(compute_surface_dice(*pair, class_thresholds=[tolerance], use_subvoxels=True, **options)),
            )
    return scores


def cropped(first: np.ndarray, second: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """Two masks (1, 1, x, y, z) about what they hold together with a voxel of margin; None if they hold nothing."""
    union = first | second
    if not union.any():
        return None
    box = []
    for axis in range(union.ndim):
        inside = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
        box.append(slice(max(int(inside[0]) - 1, 0), int(inside[-1]) + 2))
    one, other = (torch.from_numpy(mask[tuple(box)].astype(np.float32))[None, None] for mask in (first, second))
    return one, other


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric of one class over all cases.

    Attributes:
        metric, name: such as dice and caudate.
        mean, low, high: of the cases that have a value, and the 95 % bootstrap interval, for two cases or more.
        cases: how many have a value.
        missed, invented: how often the class is in the truth alone, and in the prediction alone.
    """

    metric: str
    name: str
    mean: float
    low: float
    high: float
    cases: int
    missed: int
    invented: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a set of cases.

    Attributes:
        classes: names, background excluded.
        cases: names.
        scores: (m, n, c).
        held: whether prediction and truth hold a class: (2, n, c).
        tolerance: of NSD, in mm.
        seed: of the bootstrap.
    """

    classes: tuple[str, ...]
    cases: tuple[str, ...]
    scores: np.ndarray
    held: np.ndarray
    tolerance: float
    seed: int = 0

    def across(self) -> np.ndarray:
        """Mean over the classes of each case that have a value: (m, n)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice")  # the case holds no class: NaN
            return np.nanmean(self.scores, axis=2)

    def summaries(self) -> Iterator[Summary]:
        """Every metric over the classes and for each class, in this order."""
        predicted, true = self.held
        missed, invented = true & ~predicted, predicted & ~true
        for metric, values, means in zip(METRICS, self.scores, self.across(), strict=True):
            yield summary(metric, ACROSS, means, int(missed.sum()), int(invented.sum()), self.seed)
            for name, *column in zip(self.classes, values.T, missed.sum(axis=0), invented.sum(axis=0), strict=True):
                yield summary(metric, name, column[0], int(column[1]), int(column[2]), self.seed)

    def extremes(self) -> dict[str, int]:
        """Numbers of the best, median and worst case by Dice; fewer if there are not as many cases with a value."""
        dice = self.across()[0]
        order = [int(case) for case in np.argsort(-dice, kind="stable") if not math.isnan(dice[case])]
        chosen = {"best": order[:1], "worst": order[1:][-1:], "median": order[1:-1][(len(order) - 3) // 2 :][:1]}
        return {title: chosen[title][0] for title in ("best", "median", "worst") if chosen[title]}

    def print(self, console: Console) -> None:
        """The means as a table."""
        columns = ("metric", "mean", "95 % interval", "cases", "missed", "invented")
        table = Table(*(Column(title, justify="left" if title == "metric" else "right") for title in columns))
        for row in self.summaries():
            interval = "" if math.isnan(row.low) else f"{row.low:.4f} to {row.high:.4f}"
            counts = (str(count) for count in (row.cases, row.missed, row.invented))
            table.add_row(f"{row.metric}/{row.name}", f"{row.mean:.4f}", interval, *counts)
        console.print(table)

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes everything to a JSON file and the scores of each case, one a line, to a CSV file beside it.

        Args:
            about: what was evaluated, for the JSON file. A score without a value is null there and empty in the CSV.
        """
        rows = [
            {"case": case, "class": name, **dict(zip(METRICS, self.scores[:, j, i].tolist(), strict=True))}
            for j, case in enumerate(self.cases)
            for i, name in enumerate(self.classes)
        ]
        means = {
            f"{row.metric}/{row.name}": {
                "mean": row.mean,
                "interval": [row.low, row.high],
                "cases": row.cases,
                "missed": row.missed,
                "invented": row.invented,
            }
            for row in self.summaries()
        }
        method = {"nsd_tolerance_mm": self.tolerance, "bootstrap": {"resamples": RESAMPLES, "seed": self.seed}}
        extremes = {title: self.cases[case] for title, case in self.extremes().items()}

        def write_table(partial: Path) -> None:
            with partial.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, ("case", "class", *METRICS))
                table.writeheader()
                for row in rows:
                    table.writerow({key: value for key, value in row.items() if value == value})  # NaN equals nothing

        write_atomically(path.with_suffix(".csv"), write_table)
        write_json(path, {**about, **method, "means": means, "extremes": extremes, "cases": rows})


def summary(metric: str, name: str, values: np.ndarray, missed: int, invented: int, seed: int) -> Summary:
    """Mean and percentile bootstrap over cases of the values that are not NaN."""
    known = values[~np.isnan(values)]
    low = high = math.nan
    if len(known) > 1:
        drawn = np.random.default_rng(seed).integers(len(known), size=(RESAMPLES, len(known)))
        low, high = (float(edge) for edge in np.quantile(known[drawn].mean(axis=1), (0.025, 0.975)))
    mean = float(known.mean()) if len(known) else math.nan
    return Summary(
        metric=metric, name=name, mean=mean, low=low, high=high, cases=len(known), missed=missed, invented=invented
    )
