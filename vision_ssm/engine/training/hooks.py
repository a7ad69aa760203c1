"""Hooks that make a run resumable: plain checkpoints, exact random state, stops between two steps."""

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

__all__ = ["InterruptHook", "PlainStateHook", "TrainingInterrupted", "deferred_interrupt"]


class PlainStateHook(Hook):
    """Keeps the log history as tensors, and every process's state of the random generators, in each checkpoint.

    mmengine pickles its ``HistoryBuffer``; tensors in their place are what a safe ``torch.load`` accepts. The
    generators are put back just before the first resumed step, after everything that a start draws from them. What a
    validation draws leaves training as it is; one that was due after the step of the checkpoint is made up for.
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
        checkpoint["random_states"] = all_gather_object(random_state())

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        scalars = checkpoint["message_hub"]["log_scalars"]
        checkpoint["message_hub"]["log_scalars"] = {
            name: HistoryBuffer(values.tolist(), counts.tolist()) for name, (values, counts) in scalars.items()
        }
        self.random_state = checkpoint["random_states"][get_rank()]

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        if self.random_state is None or runner.val_loop is None or loop.iter < loop.val_begin:
            return
        if loop.iter % loop.val_interval == 0 or loop.iter == loop.max_iters:
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        self.training_state = random_state()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        set_random_state(self.training_state)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.random_state is None:
            return
        set_random_state(self.random_state)
        self.random_state = None


def random_state() -> dict[str, Any]:
    """States of this process's generators: torch's on the CPU and on its GPU, NumPy's, Python's."""
    name, keys, *rest = np.random.get_state()
    state = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request, with everything that is needed to go on kept in ``checkpoint``."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; kept {checkpoint}. Repeat the command with --resume")
        self.checkpoint = checkpoint
        self.step = step


class InterruptRequest:
    """Whether Ctrl-C was pressed, or SIGTERM sent; a second time interrupts at once."""

    def __init__(self) -> None:
        self.pending = False

    def __call__(self, signum: int, frame: Any) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True


@contextmanager
def deferred_interrupt() -> Iterator[InterruptRequest]:
    """Turns Ctrl-C, and a scheduler's SIGTERM, into a request, so that no step is left half done.

    Only the main thread receives signals.
    """
    request = InterruptRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class InterruptHook(Hook):
    """After the step in which Ctrl-C was pressed, or SIGTERM came: writes a checkpoint and stops."""

    priority = "LOWEST"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        pending = torch.tensor(int(runner.interrupt.pending))
        all_reduce(pending, op="max")  # processes stop together
        if not pending or not runner.optim_wrapper.should_update():  # accumulated gradients would be lost
            return
        step = runner.iter + 1
        name = f"iter_{step}.pth"
        runner.save_checkpoint(runner.work_dir, name, meta={"epoch": runner.epoch, "iter": step}, by_epoch=False)
        raise TrainingInterrupted(Path(runner.work_dir, name), step)
