"""Pictures of a run, loss curves and label maps over the image, and of a benchmark."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch, Rectangle
from nibabel.orientations import apply_orientation, io_orientation

from vision_ssm.engine.benchmark.rows import Row
from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.erf import PARTS, Field

__all__ = ["Shown", "curves", "overlays", "receptive_fields", "resolution", "save_figure", "upright"]

COLOURS = colormaps["tab10"](range(10))[:, :3]
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


def resolution(rows: Sequence[Row]) -> Figure:
    """Time and peak memory per image against the number of 16 x 16 px tokens, both axes logarithmic.

    Args:
        rows: of models; a column of panels for each direction, a row for time and one for memory if it was measured.

    Raises:
        ValueError: no row is of a model.
    """
    models = [(row.side, row) for row in rows if row.side is not None]
    if not models:
        raise ValueError("nothing to plot: no row is of a model; measure the suite models or resolution")
    directions = list(dict.fromkeys(row.direction for _, row in models))
    subjects = list(dict.fromkeys(row.subject for _, row in models))
    measures: dict[str, Callable[[Row], float | None]] = {"ms per image": lambda row: 1e3 / row.samples_per_s}
    if all(row.peak_mib is not None for _, row in models):
        measures["peak MiB per image"] = lambda row: row.peak_mib and row.peak_mib / row.batch
    figure = Figure(figsize=(5 * len(directions), 3.6 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), len(directions), squeeze=False, sharex=True)
    for line, (label, value) in zip(panels, measures.items(), strict=True):
        for axes, direction in zip(line, directions, strict=True):
            lines: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
            for side, row in sorted(models, key=lambda model: model[0]):
                if row.direction == direction:
                    lines.setdefault((row.subject, row.run), []).append(((side / 16) ** 2, value(row)))
            for (subject, run), points in lines.items():
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[subjects.index(subject) % len(COLOURS)],
                    linestyle={"eager": "--", "compiled": "-"}.get(run, ":"),
                    marker=".",
                    label=f"{subject}, {run}",
                )
            axes.set(xscale="log", yscale="log", ylabel=label, title=direction)
            axes.grid(alpha=0.3, which="both")
    for axes in panels[-1]:
        axes.set_xlabel("tokens of 16 x 16 px")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def receptive_fields(fields: Mapping[str, Field], title: str) -> Figure:
    """Each field on a logarithmic scale relative to its strongest pixel, with the squares that ``areas`` measures."""
    figure = Figure(figsize=(4.4 * len(fields) + 1, 4.8), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    scale = LogNorm(1e-6, 1, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        relative = field.shares / field.shares.max()
        height, width = relative.shape
        drawn = axes.imshow(relative, norm=scale, cmap="viridis", extent=(0, width, height, 0), interpolation="nearest")
        row, column = field.centre
        for part in PARTS:
            half = field.radius(part) + 0.5  # to the edge of the pixels
            square = Rectangle(
                (column - half, row - half), 2 * half, 2 * half, fill=False, color="white", linewidth=0.8
            )
            axes.add_patch(square)
        areas = ", ".join(f"{part} in {area:.1%}" for part, area in field.areas().items())
        axes.set_title(f"{name}, mean of {field.samples}\n{areas} of the area", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(drawn, ax=panels, label="gradient, relative to the strongest pixel", extend="min")
    figure.suptitle(title)
    return figure


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
