"""The table and the figure of an experiment, rendered from its runs."""
# Shapes: n seeds, k structures.

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure, FigureBase

from vision_ssm.engine.experiment import rollouts
from vision_ssm.engine.experiment.runs import UNCLOCKED, Run

__all__ = ["compare", "render"]

TWIN = "_identity"  # ends the name of the network without the scan
RESAMPLES = 10_000
METHOD = (
    "Dice and HD95 are means over seeds and structures; intervals are 95 % bootstrap intervals that draw both anew, "
    "those of differences in pairs of one seed and structure. They say how much seeds and structures vary, and nothing "
    "of other patients."
)
CLOCK = f"The clock starts after {UNCLOCKED} steps; s/step leaves out waiting for data."

Networks = Mapping[str, Sequence[Run]]


class View(NamedTuple):
    """How networks of one kind are compared.

    Attributes:
        method: what the numbers are.
        headings: of the columns of scores, from all runs.
        cells: under them, from a network's runs and its twin's, if there is one.
        draw: the panels of a figure, as high and wide as ``inches`` says of the number of networks.
    """

    method: str
    headings: Callable[[Sequence[Run]], list[str]]
    cells: Callable[[Sequence[Run], Sequence[Run] | None], list[str]]
    draw: Callable[[FigureBase, Networks], None]
    inches: Callable[[int], tuple[float, float]]


def render(runs: Sequence[Run]) -> str:
    """Markdown: a table for each data set, budget and machine, with the limits that the config states."""
    groups = [list(group) for _, group in sets(runs)]
    methods = dict.fromkeys(view(group).method for group in groups)
    return "\n\n".join("\n".join(lines(group)) for group in groups) + f"\n\n{' '.join([*methods, CLOCK])}\n"


def view(runs: Sequence[Run]) -> View:
    """The one for the scores of these runs."""
    return next(view for metric, view in VIEWS.items() if f"{metric}/mean" in runs[0].scores)


def sets(runs: Sequence[Run]) -> Iterator[tuple[tuple[str, float, str], Iterator[Run]]]:
    def key(run: Run) -> tuple[str, float, str]:
        return run.config, run.seconds, run.environment.device

    return groupby(sorted(runs, key=key), key=key)


def lines(runs: Sequence[Run]) -> Iterator[str]:
    first = runs[0]
    machine = first.environment
    commits = ", ".join(sorted({run.environment.commit for run in runs}))
    yield (
        f"`{first.config}`: {first.seconds:g} s of training for each run on {machine.device}, torch {machine.torch}, "
        f"commit {commits}. {first.notes}"
    )
    yield ""
    shown = view(runs)
    headings = shown.headings(runs)
    yield f"| network | parameters (M) | {' | '.join(headings)} | steps | s/step | peak GiB | seeds |"
    yield f"|---|---:|{'---|' * len(headings)}---:|---:|---:|---:|"
    named = networks(runs)
    for name, mine in named.items():
        peaks = [run.peak_gib for run in mine if run.peak_gib is not None]
        cells = (
            f"`{name}`",
            f"{mine[0].parameters / 1e6:.2f}",
            *shown.cells(mine, named.get(name + TWIN)),
            f"{np.mean([run.steps for run in mine]):.0f}",
            f"{np.mean([run.s_per_step for run in mine]):.4f}",
            f"{max(peaks):.2f}" if peaks else "",
            str(len(mine)),
        )
        yield f"| {' | '.join(cells)} |"


def overlap_headings(runs: Sequence[Run]) -> list[str]:
    return ["Dice (95 % interval)", "minus its twin's", "HD95 mm"]


def overlap_cells(runs: Sequence[Run], twins: Sequence[Run] | None) -> list[str]:
    dice, distances = (table(runs, metric) for metric in ("dice", "hd95"))
    lost = int(np.isnan(distances).sum())
    return [
        f"{dice.mean():.4f} ({bounds(dice)})",
        "" if twins is None else difference(runs, twins),
        ("" if lost == distances.size else f"{np.nanmean(distances):.2f}") + (f", {lost} not found" if lost else ""),
    ]


def networks(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by network, each by seed; a twin follows its network."""
    found = list(dict.fromkeys(run.network for run in runs))

    def place(name: str) -> tuple[int, str]:
        base = name.removesuffix(TWIN)
        return found.index(base if base in found else name), name

    return {
        name: sorted((r for r in runs if r.network == name), key=lambda run: run.seed)
        for name in sorted(found, key=place)
    }


def table(runs: Sequence[Run], metric: str) -> np.ndarray:
    """(n, k), NaN where a score is missing."""
    names = [name for name in runs[0].scores if name.startswith(f"{metric}/") and name != f"{metric}/mean"]
    return np.array([[run.scores[name] for name in names] for run in runs], dtype=float)


def difference(runs: Sequence[Run], twins: Sequence[Run]) -> str:
    """Mean difference of Dice over the seeds that both have, with its interval."""
    seeds = {run.seed for run in runs} & {twin.seed for twin in twins}
    if not seeds:
        return ""
    pair = [table([run for run in side if run.seed in seeds], "dice") for side in (runs, twins)]
    values = pair[0] - pair[1]
    return f"{values.mean():+.4f} ({bounds(values, '+')})"


def bounds(values: np.ndarray, sign: str = "") -> str:
    low, high = interval(values)
    return f"{low:{sign}.4f} to {high:{sign}.4f}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of values (n, k): both seeds and structures are drawn anew."""
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(size, size=(RESAMPLES, size)) for size in values.shape)
    means = values[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def compare(runs: Sequence[Run]) -> Figure:
    """The panels of every data set, budget and machine, side by side."""
    groups = [list(group) for _, group in sets(runs)]
    sizes = [view(group).inches(len(networks(group))) for group in groups]
    figure = Figure(figsize=(sum(wide for wide, _ in sizes), max(high for _, high in sizes)), layout="constrained")
    parts = figure.subfigures(1, len(groups), squeeze=False, width_ratios=[wide for wide, _ in sizes])[0]
    for part, group in zip(parts, groups, strict=True):
        part.suptitle(f"{group[0].config}, {group[0].seconds:g} s", fontsize=10)
        view(group).draw(part, networks(group))
    return figure


def draw_overlap(part: FigureBase, named: Networks) -> None:
    """Dice of every network: a dot for each seed, a line for the interval."""
    axes = part.subplots()
    for row, mine in enumerate(named.values()):
        dice = table(mine, "dice")
        colour = "0.5" if mine[0].network.endswith(TWIN) else "C0"
        axes.plot(interval(dice), (row, row), color=colour, linewidth=1.5)
        axes.plot(dice.mean(axis=1), [row] * len(dice), "o", color=colour, markersize=4)
    axes.set_yticks(range(len(named)), list(named))
    axes.invert_yaxis()
    axes.set_xlabel("Dice on the test set")
    axes.grid(axis="x", alpha=0.3)


VIEWS = {
    "dice": View(METHOD, overlap_headings, overlap_cells, draw_overlap, lambda count: (5.5, 0.4 * count + 1.2)),
    "mse": View(rollouts.METHOD, rollouts.headings, rollouts.cells, rollouts.draw, lambda count: (9.0, 3.8)),
}
"""By a metric that only scores of one kind have."""
