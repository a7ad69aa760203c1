"""A trained network, and the metrics of its config's test set."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel

from vision_ssm.engine.checkpoint import load_into, read_state
from vision_ssm.engine.config import build
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.training.device import device

__all__ = ["evaluate", "load_task"]


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
def evaluate(config: Config, task: BaseModel) -> dict[str, float]:
    """Every metric of ``config.test_evaluator`` on ``config.test_dataloader``."""
    loader = build_loader(config.test_dataloader)
    evaluator = Evaluator(build(config.test_evaluator))
    for batch in loader:
        evaluator.process(task.test_step(batch), batch)
    dataset: Any = loader.dataset
    return evaluator.evaluate(len(dataset))
