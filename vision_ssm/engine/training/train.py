"""One training run from config to published weights."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from rich.console import Console
from torch import nn

from vision_ssm.engine.checkpoint import save_weights, write_json
from vision_ssm.engine.config import config_name
from vision_ssm.engine.tasks import count_parameters, input_channels
from vision_ssm.engine.training.build import build_runner
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import evaluate
from vision_ssm.engine.training.progress import ProgressHook
from vision_ssm.engine.training.runner import SafeRunner

__all__ = ["TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run measured.

    Attributes:
        config: name of the config.
        parameters: trainable parameters of the network.
        steps: optimizer steps since the start, earlier runs included.
        seconds: wall clock of this run's training and validation; evaluation at the end is not counted.
        device: type of the device, such as cpu or cuda.
        losses: training loss of every step, the mean over all processes.
        scores: metrics on the test set after the last step.
    """

    config: str
    parameters: int
    steps: int
    seconds: float
    device: str
    losses: list[float]
    scores: dict[str, float]


def train(
    config: Config, work_dir: Path, *, console: Console, title: str = "training", resume: str | None = None
) -> tuple[TrainingResult, nn.Module]:
    """Trains, evaluates on the test set, and leaves ``weights.safetensors`` and ``metrics.json`` in ``work_dir``.

    Args:
        resume: see ``build_runner``.

    Returns:
        What was measured, and the task that was trained, in evaluation mode.

    Raises:
        FileExistsError, PermissionError, FileNotFoundError, ValueError: see ``build_runner``.
        TrainingInterrupted: Ctrl-C; a checkpoint was kept.
    """
    progress = ProgressHook(console, title=title, score=config.score)
    runner = build_runner(config, work_dir, resume=resume, hooks=(progress,))
    start = time.perf_counter()
    try:
        runner.train()
    finally:
        progress.close()
    seconds = time.perf_counter() - start

    task = runner.finish()
    result = TrainingResult(
        config=config_name(config),
        parameters=count_parameters(task.net),
        steps=runner.iter,
        seconds=seconds,
        device=device().type,
        losses=loss_curve(runner),
        scores=evaluate(config, task, console=console),
    )
    if is_main_process():
        save_weights(
            work_dir / "weights.safetensors",
            task.net,
            config=result.config,
            classes=tuple(config.get("classes", ())),
            channels=input_channels(runner.train_dataloader.dataset[0]),
        )
        write_json(work_dir / "metrics.json", asdict(result))
    return result, task


def loss_curve(runner: SafeRunner) -> list[float]:
    """Training loss of every step, those before an interruption included."""
    losses, _ = runner.message_hub.get_scalar("train/loss").data
    return [float(loss) for loss in losses]
