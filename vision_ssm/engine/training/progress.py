"""A progress bar with loss, score and time left."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressHook"]

SMOOTHING = 0.9


class ProgressHook(Hook):
    """Shows the running loss and the latest validation score; on a plain stream, one line per validation.

    Args:
        console: where the bar goes.
        title: what is trained.
        score: the validation metric shown, such as ``dice/mean``.
    """

    priority = "LOW"

    def __init__(self, console: Console, *, title: str, score: str) -> None:
        self.console = console
        self.score = score
        self.loss: float | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[name]} {task.fields[score]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar = self.progress.add_task(title, loss="-", name=score, score="-", total=None)
        self.title = title

    def before_train(self, runner: Runner) -> None:
        self.progress.update(self.bar, total=runner.max_iters, completed=runner.iter)
        self.progress.start()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = outputs["loss"].item()
        self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.progress.update(self.bar, completed=runner.iter + 1, loss=f"{self.loss:.3f}")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        score = f"{(metrics or {})[self.score]:.3f}"
        self.progress.update(self.bar, score=score)
        if not self.console.is_terminal and self.loss is not None:
            step = f"step {runner.iter} of {runner.max_iters}"
            self.console.print(f"{self.title}: {step}, loss {self.loss:.3f}, {self.score} {score}")

    def after_train(self, runner: Runner) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is; needed where training ended by an exception."""
        self.progress.stop()
