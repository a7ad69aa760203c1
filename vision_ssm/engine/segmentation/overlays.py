"""Label maps over the slices of the images that they label."""
# Shapes: x y z the grid of a volume.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from nibabel.orientations import apply_orientation, io_orientation

from vision_ssm.engine.figures import COLOURS

__all__ = ["Shown", "overlays", "upright"]

SLICES = 5


@dataclass(frozen=True)
class Shown:
    """A case of a figure.

    Attributes:
        image: (x, y, z), with x to the right and y to the front, see ``upright``.
        maps: title -> labels (x, y, z); the first chooses the slices.
        spacing: millimetres between voxels along x, y and z.
    """

    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)

    def share(self) -> float:
        """Height of a slice as a share of its width, at most 1: higher slices are narrower."""
        width, height = (size * step for size, step in zip(self.image.shape[:2], self.spacing[:2], strict=True))
        return height / max(width, height)


def upright(image: np.ndarray, maps: Mapping[str, np.ndarray], affine: np.ndarray) -> Shown:
    """A case as it lies in its file, turned so that its axes run to the right, to the front and up."""
    turns = io_orientation(affine)
    turned = {title: apply_orientation(labels, turns) for title, labels in maps.items()}
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turns[:, 0])]
    return Shown(apply_orientation(image, turns), turned, tuple(spacing.tolist()))


def overlays(cases: Mapping[str, Shown], classes: Sequence[str]) -> Figure:
    """Axial slices of each case's image under one row of label maps each.

    Args:
        cases: by title, which may be empty.
        classes: names of the labels 1, 2, ...
    """
    heights = [2.4 * len(case.maps) * case.share() + 0.4 for case in cases.values()]
    figure = Figure(figsize=(2.2 * SLICES, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, case) in zip(parts, cases.items(), strict=True):
        if title:
            part.suptitle(title)
        draw_rows(part, case, len(classes))
    found = {int(label) for case in cases.values() for labels in case.maps.values() for label in np.unique(labels)}
    patches = [
        Patch(color=COLOURS[(label - 1) % len(COLOURS)], label=name)
        for label, name in enumerate(classes, start=1)
        if label in found
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def draw_rows(part: FigureBase, case: Shown, classes: int) -> None:
    chosen = informative_slices(next(iter(case.maps.values())))
    darkest, brightest = np.percentile(case.image, (0.5, 99.5))
    grid = part.subplots(len(case.maps), len(chosen), squeeze=False)
    for row, (title, labels) in zip(grid, case.maps.items(), strict=True):
        for axes, position in zip(row, chosen, strict=True):
            aspect = case.spacing[1] / case.spacing[0]
            image = case.image[..., position].T
            axes.imshow(image, cmap="gray", origin="lower", aspect=aspect, vmin=darkest, vmax=brightest)
            colours = coloured(labels[..., position].T, classes)
            axes.imshow(colours, origin="lower", aspect=aspect, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(title)
    for axes, position in zip(grid[0], chosen, strict=True):
        axes.set_title(f"slice {position}", fontsize=8)


def informative_slices(labels: np.ndarray) -> list[int]:
    """Positions along z spread evenly over the slices that hold labels, or over all if none does."""
    labelled = np.flatnonzero(labels.any(axis=(0, 1)))
    positions = labelled if len(labelled) else np.arange(labels.shape[2])
    inner = np.linspace(0, len(positions) - 1, SLICES + 2)[1:-1]
    return sorted({int(positions[round(step)]) for step in inner})


def coloured(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels (y, x) -> colours (y, x, 4), transparent where there is no label."""
    colours = np.zeros((*labels.shape, 4))
    for label in range(1, classes + 1):
        colours[labels == label] = (*COLOURS[(label - 1) % len(COLOURS)], 0.55)
    return colours
