"""A trained network, and the metrics of its config's test set."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from rich.console import Console
from rich.progress import track

from vision_ssm.engine.checkpoint import load_into, read_state, write_json
from vision_ssm.engine.config import build
from vision_ssm.engine.findings import origin, print_files, print_numbers
from vision_ssm.engine.outputs import require_output
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.training.device import device

__all__ = ["evaluate", "load_task", "measure_by_metrics"]


def load_task(config: Config, checkpoint: Path) -> BaseModel:
    """The config's task with the weights of ``checkpoint``, on ``device()`` and in evaluation mode.

    Args:
        checkpoint: published weights (.safetensors) or a Runner's checkpoint (.pth).

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, or of another model.
    """
    state = read_state(checkpoint)
    task = build(config.model)
    load_into(task.net, state, checkpoint)
    return task.to(device()).eval()


@torch.no_grad()
def evaluate(config: Config, task: BaseModel, *, console: Console | None = None) -> dict[str, float]:
    """Every metric of ``config.test_evaluator`` on ``config.test_dataloader``.

    Args:
        console: where a bar shows how far the test is, if it is a terminal.
    """
    loader = build_loader(config.test_dataloader)
    evaluator = Evaluator(build(config.test_evaluator))
    hidden = console is None or not console.is_terminal
    for batch in track(loader, "testing", console=console, disable=hidden):
        evaluator.process(task.test_step(batch), batch)
    dataset: Any = loader.dataset
    return evaluator.evaluate(len(dataset))


def measure_by_metrics(config: Config, checkpoint: Path, *, console: Console, out: Path | None = None) -> None:
    """Prints the metrics of a checkpoint on its config's test set, and writes them if ``out``, a JSON file, is given.

    Raises:
        FileNotFoundError, ValueError: see ``load_task`` and ``require_output``.
    """
    require_output(out)
    scores = evaluate(config, load_task(config, checkpoint), console=console)
    print_numbers(console, scores)
    if out is not None:
        write_json(out, {**origin(config, checkpoint=checkpoint), **scores})
        print_files(console, out)
