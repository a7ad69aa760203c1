"""What a comparison of next-frame models says: how far each drifts, as cells of a table and as curves."""
# Shapes: n seeds, f generated frames.

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import FigureBase

from vision_ssm.engine.experiment.runs import Run
from vision_ssm.engine.video.rollouts import LABELS, draw_curves

__all__ = ["METHOD", "cells", "draw", "headings"]

METHOD = (
    "Qualities of generated frames, on values in [0, 1], are means over clips, the frames stated, and seeds; the range "
    "is that of the seeds."
)


def headings(runs: Sequence[Run]) -> list[str]:
    """Of the columns that ``cells`` fills: each quality over the first half of the frames, and over all of them."""
    return [
        f"{LABELS[name]}, frames 1 to {frames}"
        for name, curve in curves(runs).items()
        for frames in horizons(curve.shape[1])
    ]


def cells(runs: Sequence[Run], twins: Sequence[Run] | None = None) -> list[str]:
    """The columns of one network, by its runs; a twin is a network like any other."""
    return [
        f"{means.mean():.4f} ({means.min():.4f} to {means.max():.4f})"
        for curve in curves(runs).values()
        for frames in horizons(curve.shape[1])
        for means in [curve[:, :frames].mean(axis=1)]
    ]


def draw(part: FigureBase, networks: Mapping[str, Sequence[Run]]) -> None:
    """A panel for each quality: a line for the mean of a network's seeds, a band for their range."""
    draw_curves(part, {name: curves(runs) for name, runs in networks.items()})


def horizons(frames: int) -> tuple[int, int]:
    return max(frames // 2, 1), frames


def curves(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Quality -> (n, f), NaN where a frame was not finite."""
    names = dict.fromkeys(key.partition("/")[0] for key in runs[0].scores)
    frames = [key.partition("/")[2] for key in runs[0].scores if key.startswith(f"{next(iter(names))}/")]
    numbers = sorted(int(frame) for frame in frames if frame != "mean")
    return {
        name: np.array([[run.scores[f"{name}/{number}"] for number in numbers] for run in runs], dtype=float)
        for name in names
    }
