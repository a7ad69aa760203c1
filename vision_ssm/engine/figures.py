"""Pictures of a run: loss curves, the colours of classes, and how a picture is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from vision_ssm.engine.checkpoint import write_atomically

__all__ = ["curves", "save_figure"]

COLOURS = colormaps["tab10"](range(10))[:, :3]


def curves(losses: Mapping[str, Sequence[float]], window: int = 10) -> Figure:
    """Training loss of each run, averaged over ``window`` steps."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for title, values in losses.items():
        width = min(window, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(width, len(values) + 1), smooth, label=title)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {window} steps")
    axes.legend(frameon=False)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG whole."""
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
