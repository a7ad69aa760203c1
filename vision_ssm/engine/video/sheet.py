"""Sheets of frames: clips side by side in rows of pictures."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vision_ssm.engine.video.next_frame import unit

__all__ = ["chosen", "contact_sheet"]

COLUMNS = 10
SIDE = 1.2  # of a frame, in inches


def chosen(total: int) -> list[int]:
    """Numbers of at most ``COLUMNS`` frames among ``total``, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, total - 1, min(total, COLUMNS))})


def contact_sheet(rows: Mapping[str, Mapping[int, Tensor | None]]) -> Figure:
    """Rows of frames (k, h, w) with values in [-1, 1], each under its number.

    Args:
        rows: title -> number -> frame, or None for a place that stays empty; the first row has a frame.
    """
    first = next(frame for frame in next(iter(rows.values())).values() if frame is not None)
    _, height, width = first.shape
    columns = max(map(len, rows.values()))
    size = (SIDE * columns + 0.4, len(rows) * (SIDE * height / width + 0.3))
    figure = Figure(figsize=size, layout="constrained")
    for line, (title, frames) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axes, (number, frame) in zip(line, frames.items(), strict=False):  # a row may have room for more
            if frame is not None:
                picture = unit(frame).clamp(0, 1).cpu().movedim(0, -1).numpy()
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(str(number), fontsize=8)
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        line[0].set_ylabel(title)
    return figure
