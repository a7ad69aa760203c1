"""Scores of label maps, a network's or a folder's, as tables, files and a figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from rich.console import Console
from rich.progress import track

from vision_ssm.engine.config import build
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.findings import origin, print_files, print_numbers
from vision_ssm.engine.metrics import HD95, Dice
from vision_ssm.engine.outputs import require_output
from vision_ssm.engine.segmentation.overlays import overlays
from vision_ssm.engine.segmentation.samples import Sample, folder_samples, test_samples
from vision_ssm.engine.segmentation.scores import Evaluation, score
from vision_ssm.engine.tasks import Segmentation
from vision_ssm.engine.training.evaluate import load_task

__all__ = ["draw_extremes", "measure_folder", "measure_volumes", "score_samples"]


def measure_volumes(
    config: Config, checkpoint: Path, *, console: Console, tolerance: float = 1.0, out: Path | None = None
) -> None:
    """Prints the scores of a checkpoint on its config's test set, and writes them if ``out`` is given.

    Args:
        tolerance: of NSD, in millimetres.
        out: JSON file; a table and a figure come beside it, see ``report``.

    Raises:
        FileNotFoundError, ValueError: see ``load_task``, ``require_output`` and ``score_samples``.
    """
    require_output(out)
    task = load_task(config, checkpoint)
    assert isinstance(task, Segmentation)
    samples = test_samples(config, task)
    others = [metric for metric in build(config.test_evaluator) if not isinstance(metric, (Dice, HD95))]
    evaluation = score_samples(samples, config.classes, console=console, tolerance=tolerance, others=others)
    numbers = {name: value for metric in others for name, value in metric.evaluate(len(samples)).items()}
    about = origin(config, checkpoint=checkpoint)
    report(evaluation, samples, about, console=console, out=out, others=numbers)


def measure_folder(
    config: Config,
    labels: Path,
    truth: Path,
    images: Path | None = None,
    *,
    console: Console,
    tolerance: float = 1.0,
    out: Path | None = None,
) -> None:
    """As ``measure_volumes``, of label maps in a folder against those of the same names in another.

    Args:
        images: shown in the figure.

    Raises:
        FileNotFoundError, ValueError: see ``folder_samples``, ``require_output`` and ``score_samples``.
    """
    require_output(out)
    samples = folder_samples(config, labels, truth, images)
    evaluation = score_samples(samples, config.classes, console=console, tolerance=tolerance)
    report(evaluation, samples, origin(config, labels=labels, truth=truth), console=console, out=out)


def score_samples(
    samples: Sequence[Sample],
    classes: Sequence[str],
    *,
    console: Console,
    tolerance: float = 1.0,
    others: Sequence[BaseMetric] = (),
) -> Evaluation:
    """Dice, HD95 and NSD of every case and class.

    Args:
        classes: names, background excluded.
        console: where the progress goes.
        tolerance: of NSD, in millimetres.
        others: further metrics that see the same label maps.

    Raises:
        FileNotFoundError, ValueError: a case cannot be loaded; means without it would flatter or blame.
        ValueError: ``tolerance`` is no distance.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be millimetres from 0 up, and finite; got {tolerance}")
    scores, held = [], []
    for sample in track(samples, "scoring", console=console, disable=not console.is_terminal):
        case = sample.load()
        scores.append(score(case.prediction, case.truth, len(classes), spacing=case.spacing, tolerance=tolerance))
        labels = np.arange(1, len(classes) + 1)
        held.append(np.stack([np.isin(labels, np.unique(held_by)) for held_by in (case.prediction, case.truth)]))
        pair = {"prediction": case.prediction, "label": case.truth}
        for metric in others:
            metric.process({}, [{key: torch.from_numpy(m.astype(np.int64))[None] for key, m in pair.items()}])
    return Evaluation(
        classes=tuple(classes),
        cases=tuple(sample.name for sample in samples),
        scores=np.stack(scores, axis=1),
        held=np.stack(held, axis=1),
        tolerance=tolerance,
    )


def draw_extremes(path: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> bool:
    """Draws the best, median and worst case by Dice to a PNG, truth above prediction; False if no case has a Dice."""
    dice = evaluation.across()[0]
    rows = {
        f"{title}: {samples[case].name}, Dice {dice[case]:.3f}": samples[case].load().shown()
        for title, case in evaluation.extremes().items()
    }
    if rows:
        save_figure(path, overlays(rows, evaluation.classes))
    return bool(rows)


def report(
    evaluation: Evaluation,
    samples: Sequence[Sample],
    about: Mapping[str, str],
    *,
    console: Console,
    out: Path | None,
    others: Mapping[str, float] | None = None,
) -> None:
    """Prints the means; writes all scores to ``out`` (.json) and beside it (.csv), and draws the extremes (.png).

    Args:
        about: what was measured, see ``origin``.
        others: further numbers by name.
    """
    evaluation.print(console)
    print_numbers(console, others or {})
    if out is None:
        return
    evaluation.write(out, {**about, "others": others} if others else about)
    drawn = draw_extremes(out.with_suffix(".png"), evaluation, samples)
    print_files(console, out, out.with_suffix(".csv"), *([out.with_suffix(".png")] if drawn else []))
