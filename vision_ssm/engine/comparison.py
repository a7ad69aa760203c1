"""The table and the figure of an experiment, rendered from its runs."""
# Shapes: n seeds, k structures.

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure

from vision_ssm.engine.experiment import UNCLOCKED, Run

__all__ = ["compare", "render"]

TWIN = "_identity"  # ends the name of the network without the scan
RESAMPLES = 10_000
METHOD = (
    "Dice and HD95 are means over seeds and structures; intervals are 95 % bootstrap intervals that draw both anew, "
    "those of differences in pairs of one seed and structure. They say how much seeds and structures vary, and nothing "
    f"of other patients. The clock starts after {UNCLOCKED} steps; s/step leaves out waiting for data."
)


def render(runs: Sequence[Run]) -> str:
    """Markdown: a table for each data set, budget and machine, with the limits that the config states."""
    return "\n\n".join("\n".join(lines(list(group))) for _, group in sets(runs)) + f"\n\n{METHOD}\n"


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
    yield (
        "| network | parameters (M) | Dice (95 % interval) | minus its twin's | HD95 mm | steps | s/step | peak GiB "
        "| seeds |"
    )
    yield "|---|---:|---|---|---:|---:|---:|---:|---:|"
    for name, mine in networks(runs).items():
        dice, twin = table(mine, "dice"), networks(runs).get(name + TWIN)
        distances = table(mine, "hd95")
        lost = int(np.isnan(distances).sum())
        peaks = [run.peak_gib for run in mine if run.peak_gib is not None]
        cells = (
            f"`{name}`",
            f"{mine[0].parameters / 1e6:.2f}",
            f"{dice.mean():.4f} ({bounds(dice)})",
            "" if twin is None else difference(mine, twin),
            ("" if lost == distances.size else f"{np.nanmean(distances):.2f}")
            + (f", {lost} not found" if lost else ""),
            f"{np.mean([run.steps for run in mine]):.0f}",
            f"{np.mean([run.s_per_step for run in mine]):.4f}",
            f"{max(peaks):.2f}" if peaks else "",
            str(len(mine)),
        )
        yield f"| {' | '.join(cells)} |"


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
    """Dice of every network: a dot for each seed, a line for the interval; a panel for each data set."""
    groups = [list(group) for _, group in sets(runs)]
    count = max(len(networks(group)) for group in groups)
    figure = Figure(figsize=(5.5 * len(groups), 0.4 * count + 1.2), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        named = networks(group)
        for row, mine in enumerate(named.values()):
            dice = table(mine, "dice")
            colour = "0.5" if mine[0].network.endswith(TWIN) else "C0"
            axes.plot(interval(dice), (row, row), color=colour, linewidth=1.5)
            axes.plot(dice.mean(axis=1), [row] * len(dice), "o", color=colour, markersize=4)
        axes.set_yticks(range(len(named)), list(named))
        axes.invert_yaxis()
        axes.set_xlabel("Dice on the test set")
        axes.set_title(f"{group[0].config}, {group[0].seconds:g} s", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    return figure
