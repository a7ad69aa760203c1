"""Hooks that make a run resumable: plain checkpoints, exact random state, Ctrl-C between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

__all__ = ["InterruptHook", "PlainStateHook", "TrainingInterrupted", "deferred_interrupt"]


class PlainStateHook(Hook):
    """Keeps the log history as tensors and the state of the random generators in every checkpoint.

    mmengine pickles its ``HistoryBuffer``; tensors in their place are what a safe ``torch.load`` accepts. The
    generators are put back just before the first resumed step, after everything that a start draws from them.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.random_state: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {
            name: [torch.from_numpy(np.asarray(column, dtype=np.float64)) for column in history.data]
            for name, history in hub["log_scalars"].items()
        }
        hub["runtime_info"] = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in hub["runtime_info"].items()
        }
        hub["resumed_keys"] = dict(hub["resumed_keys"])
        checkpoint["param_schedulers"] = [  # a schedule keeps its function from its config
            {name: value for name, value in state.items() if not callable(value)}
            for state in checkpoint.get("param_schedulers", [])
        ]
        checkpoint["random_state"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        scalars = checkpoint["message_hub"]["log_scalars"]
        checkpoint["message_hub"]["log_scalars"] = {
            name: HistoryBuffer(values.tolist(), counts.tolist()) for name, (values, counts) in scalars.items()
        }
        self.random_state = checkpoint["random_state"]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.random_state is None:
            return
        torch.set_rng_state(self.random_state["cpu"])
        if torch.cuda.is_available() and "cuda" in self.random_state:
            torch.cuda.set_rng_state(self.random_state["cuda"])
        self.random_state = None


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request, with everything that is needed to go on kept in ``checkpoint``."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; kept {checkpoint}. Repeat the command with --resume")
        self.checkpoint = checkpoint
        self.step = step


class InterruptRequest:
    """Whether Ctrl-C was pressed; a second press interrupts at once."""

    def __init__(self) -> None:
        self.pending = False

    def __call__(self, signum: int, frame: Any) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True


@contextmanager
def deferred_interrupt() -> Iterator[InterruptRequest]:
    """Turns Ctrl-C into a request, so that no step is left half done. Only the main thread receives signals."""
    request = InterruptRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = signal.signal(signal.SIGINT, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


class InterruptHook(Hook):
    """After the step in which Ctrl-C was pressed: writes a checkpoint and stops."""

    priority = "LOWEST"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not runner.interrupt.pending:
            return
        step = runner.iter + 1
        name = f"iter_{step}.pth"
        runner.save_checkpoint(runner.work_dir, name, meta={"epoch": runner.epoch, "iter": step}, by_epoch=False)
        raise TrainingInterrupted(Path(runner.work_dir, name), step)
