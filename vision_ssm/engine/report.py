"""A report of runs side by side: a table, loss curves and overlays in one self-contained HTML file."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.training.train import TrainingResult

__all__ = ["print_scores", "score_rows", "write_report"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def score_rows(results: Mapping[str, TrainingResult]) -> list[list[str]]:
    """A table as rows of text, the first holding the titles: metrics, then parameters, steps and seconds."""
    first = next(iter(results.values()))
    rows = [["", *results]]
    for metric in first.scores:
        rows.append([label(metric), *(f"{result.scores[metric]:.3f}" for result in results.values())])
    rows.append(["parameters", *(f"{result.parameters:,}" for result in results.values())])
    rows.append(["steps", *(str(result.steps) for result in results.values())])
    rows.append([f"seconds on {first.device}", *(f"{result.seconds:.0f}" for result in results.values())])
    return rows


def print_scores(console: Console, results: Mapping[str, TrainingResult]) -> None:
    """Prints ``score_rows`` as a table."""
    head, *body = score_rows(results)
    table = Table(*(Column(title, justify="right" if title else "left") for title in head))
    for row in body:
        table.add_row(*row)
    console.print(table)


def label(metric: str) -> str:
    """``dice/caudate`` -> ``Dice caudate``; distances carry their unit."""
    kind, name = metric.split("/")
    return f"{ {'dice': 'Dice', 'hd95': 'HD95 (mm)'}.get(kind, kind) } {name}"


def write_report(
    path: Path, *, title: str, notes: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, Figure]
) -> None:
    """Writes an HTML file that needs no other file.

    Args:
        notes: paragraphs that say what was measured and how far it reaches.
        rows: a table; the first row holds the titles.
        figures: caption -> figure.
    """
    head, *body = rows
    table = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    pictures = "".join(picture(html.escape(caption), figure) for caption, figure in figures.items())
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{paragraphs}"
        f"<table><tr>{table}</tr>{lines}</table>{pictures}</html>\n"
    )
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def picture(caption: str, figure: Figure) -> str:
    """A figure inside the page, as base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">'
