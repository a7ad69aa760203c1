"""What no page holds by hand: figures of routes, tables of models, measurements and memory traffic.

They are written to ``docs/_generated`` before the pages are read, out of the package and of ``model_zoo/results``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from vision_ssm.engine.benchmark.rows import read_rows, render
from vision_ssm.kernels import ATROUS, BIDIRECTIONAL, CROSS, HILBERT, HILBERT_3D, TRI_3D, Route, Routes
from vision_ssm.kernels.routed_scan.cases import CASES
from vision_ssm.tools.__main__ import COMMANDS, tool_of
from vision_ssm.video import MODELS

__all__ = ["FIGURES", "RESULTS", "figure_of_routes", "setup", "table_of_models", "table_of_traffic", "write"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_zoo" / "results"

FORWARD, BOTH = "forward", "forward+backward"
TARGETS = {
    ("stage1", FORWARD): 0.60,
    ("stage1", BOTH): 2.40,
    ("stage2", FORWARD): 0.30,
    ("stage3", FORWARD): 0.18,
    ("stage4", FORWARD): 0.15,
    ("stage1_n16", FORWARD): 2.2,
    ("stage1_n16", BOTH): 9.0,
    ("stage1_1024px", FORWARD): 1.5,
    ("stage1_1024px", BOTH): 6.6,
}
"""Milliseconds of the SS2D core on an H100, by case and direction, that were to be reached."""
PEAK_MIB = 370
"""The same for the memory of stage 1, forward and backward: five times its map."""

IMAGES_PER_S = {FORWARD: 8200, BOTH: 2700}
"""Of VMamba-T on an H100, compiled, at least."""
TRAINING_MIB = 8192
"""Memory of that training step, at most."""
TIMES_SWIN = {FORWARD: 2.0, BOTH: 3.0}
"""VMamba-T's time on a CPU in times of Swin-T's, at most."""

ALONG, AGAINST = Route((0,)), Route((0,), reverse=True)
FIGURES: dict[str, tuple[Routes, tuple[int, ...]]] = {
    "vmamba": (CROSS, (5, 6)),
    "efficient_vmamba": (ATROUS, (6, 6)),
    "vim": (BIDIRECTIONAL, (5, 6)),
    "hydra": (BIDIRECTIONAL, (5, 6)),
    "vim2": (CROSS, (5, 6)),
    "vim2_channels": ((ALONG, AGAINST), (8,)),
    "convs5": ((ALONG,), (8,)),
    "hilbert": (HILBERT, (6, 8)),
    "tri": (TRI_3D, (3, 3, 3)),
    "hilbert_3d": (HILBERT_3D, (4, 4, 4)),
}
"""Name of a figure: its routes, and the grid that they are drawn on."""


def figure_of_routes(routes: Routes, grid: tuple[int, ...]) -> Figure:
    """A panel for each route: the way from cell to cell, dark where it begins, which a ring marks, bright at its end.

    Args:
        grid: one, two or three axes.
    """
    deep = len(grid) == 3
    size = (2.6, 2.6) if deep else (2.2, 2.2 if len(grid) == 2 else 0.6)
    figure = Figure(figsize=(size[0] * len(routes), size[1]), layout="constrained")
    panels = figure.subplots(1, len(routes), squeeze=False, subplot_kw={"projection": "3d"} if deep else {})[0]
    for panel, route in zip(panels, routes, strict=True):
        draw(panel, route, grid)
    return figure


def draw(panel: Axes, route: Route, grid: tuple[int, ...]) -> None:
    cells = np.stack(np.unravel_index(route.index(grid).numpy(), grid), axis=1)[:, ::-1]  # the last axis to the right
    every = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1)[:, ::-1]
    if len(grid) == 1:
        cells, every = (np.pad(points, ((0, 0), (0, 1))) for points in (cells, every))
    lines = LineCollection if len(grid) < 3 else Line3DCollection
    steps = np.stack([cells[:-1], cells[1:]], axis=1)
    panel.scatter(*every.T, s=14, color="0.85", zorder=1)
    panel.add_collection(lines(steps, colors=colormaps["viridis"](np.linspace(0, 0.9, len(steps))), linewidths=1.8))
    panel.scatter(*cells[:1].T, s=70, facecolors="none", edgecolors="tab:red", zorder=3)
    panel.set_aspect("equal")
    panel.margins(0.12)
    if len(grid) == 1:
        panel.set_ylim(-1, 1)
    panel.invert_yaxis()  # rows count downwards, as in an image
    panel.set_axis_off()


def table_of_models(family: str) -> str:
    """Markdown: the models that a module of ``vision_ssm.backbones`` has registered with timm."""
    lines = ["| timm name | parameters (M) | image px | channels of the feature maps | one cell covers px |"]
    lines += ["|---|---:|---:|---|---|"]
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        channels, sides = (distinct(level[key] for level in model.feature_info) for key in ("num_chs", "reduction"))
        size = model.pretrained_cfg["input_size"][-1]
        lines.append(f"| `{name}` | {millions(model)} | {size} | {channels} | {sides} |")
    return "\n".join(lines)


def distinct(values: Iterable[int]) -> str:
    """Each value once: a plain backbone has maps of one size after every block."""
    return ", ".join(str(value) for value in dict.fromkeys(values))


def table_of_video_models() -> str:
    """Markdown: ``vision_ssm.video.MODELS``, counted."""
    lines = ["| name in `vision_ssm.video.MODELS` | parameters (M) |", "|---|---:|"]
    for name, make in MODELS.items():
        with torch.device("meta"):
            lines.append(f"| `{name}` | {millions(make())} |")
    return "\n".join(lines)


def millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def table_of_traffic() -> str:
    """Markdown: numbers that the SS2D core of VMamba-T moves in half precision, by formula; see the page of kernels."""
    lines = ["| case | map, MB | routes apart, MB | fused, MB | ratio |", "|---|---:|---:|---:|---:|"]
    for name in ("stage1", "stage2", "stage3", "stage4", "stage1_1024px"):
        case = CASES[name]
        cells, routes = case.batch * math.prod(case.grid), len(case.routes)
        columns = routes * (case.rank + 2 * case.state)
        fused = cells * (3 * case.channels + 2 * columns)
        apart = cells * (2 * case.channels + 2 * columns + 7 * routes * case.channels)
        megabytes = (f"{2e-6 * numbers:.1f}" for numbers in (cells * case.channels, apart, fused))
        lines.append(f"| {name} | {' | '.join(megabytes)} | {apart / fused:.1f} |")
    return "\n".join(lines)


def table_of_targets() -> str:
    """Markdown: ``TARGETS`` beside the rows of float16 that were measured as CUDA graphs."""
    rows = [
        row for row in read_rows(RESULTS / "h100_ops.jsonl") if (row.subject, row.dtype) == ("ss2d core", "float16")
    ]
    timings = {(row.case, row.direction): row.timing for row in rows if row.timing}
    lines = ["| SS2D core | direction | target, ms | measured, ms | |", "|---|---|---:|---:|---|"]
    for (case, direction), limit in TARGETS.items():
        measured = timings[f"{case}, CUDA graph", direction].median_ms
        verdict = "met" if measured <= limit else f"missed by {measured / limit - 1:.0%}"
        lines.append(f"| {case} | {direction} | {limit:g} | {measured:.3g} | {verdict} |")
    peak = timings["stage1", BOTH].peak_mib
    assert peak is not None
    verdict = "met" if peak <= PEAK_MIB else f"missed: {peak / PEAK_MIB:.1f} times as much"
    lines.append(f"| stage1, peak memory in MiB | {BOTH} | {PEAK_MIB} | {peak:.0f} | {verdict} |")
    return "\n".join(lines)


def table_of_model_targets() -> str:
    """Markdown: what VMamba-T as a whole was to reach, beside the measured rows."""
    h100, cpu = (read_rows(RESULTS / f"{name}.jsonl") for name in ("h100_models", "cpu"))
    ours = {row.direction: row for row in h100 if (row.subject, row.run) == ("vmamba_tiny", "compiled, CUDA graphs")}
    times = {(row.subject, row.direction): row.timing.median_ms for row in cpu if row.timing}
    peak = ours[BOTH].peak_mib
    assert peak is not None
    rows: list[tuple[str, str, float, float]] = [
        (f"H100, 128 images, {direction}, images/s", "at least", limit, ours[direction].samples_per_s)
        for direction, limit in IMAGES_PER_S.items()
    ]
    rows.append((f"H100, 128 images, {BOTH}, peak memory in MiB", "at most", TRAINING_MIB, peak))
    for direction, limit in TIMES_SWIN.items():
        ratio = times["vmamba_tiny", direction] / times["swin_tiny_patch4_window7_224", direction]
        rows.append((f"CPU, one image, {direction}, times of Swin-T", "at most", limit, ratio))
    lines = ["| VMamba-T at 224 px | target | measured | |", "|---|---|---:|---|"]
    for what, bound, limit, measured in rows:
        verdict = "met" if (measured >= limit) == (bound == "at least") else "missed"
        lines.append(f"| {what} | {bound} {limit:,g} | {measured:,.{0 if limit > 100 else 2}f} | {verdict} |")
    return "\n".join(lines)


def table_of_rows(file: Path) -> str:
    """Markdown: measured rows as ``vision-ssm benchmark render`` shows them."""
    return render(read_rows(file))


def help_of_commands() -> str:
    """Markdown: what each command says with ``--help``."""
    texts = {command: tool_of(command).parser().format_help() for command in COMMANDS}
    return "\n".join(f"## vision-ssm {command}\n\n```text\n{text}```\n" for command, text in texts.items())


def fragments() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name of each Markdown file, and what makes its text."""
    for family in ("vmamba", "efficient_vmamba", "vim", "hydra", "vim2"):
        yield f"models_{family}", partial(table_of_models, family)
    yield "models_convs5", table_of_video_models
    yield "traffic", table_of_traffic
    yield "targets", table_of_targets
    yield "model_targets", table_of_model_targets
    yield "commands", help_of_commands
    for suite in ("h100_ops", "h100_models"):
        yield suite, partial(table_of_rows, RESULTS / f"{suite}.jsonl")


def write(folder: Path, figures: Mapping[str, tuple[Routes, tuple[int, ...]]] = FIGURES) -> None:
    """Writes everything into ``folder``, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (routes, grid) in figures.items():
        figure_of_routes(routes, grid).savefig(folder / f"routes_{name}.svg", metadata={"Date": None})
    for name, text in fragments():
        (folder / f"{name}.md").write_text(text() + "\n", encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "_generated"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
