"""Pictures of a benchmark."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from vision_ssm.engine.benchmark.rows import Row
from vision_ssm.engine.figures import COLOURS

__all__ = ["resolution"]


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
