"""Watched numbers: a step whose loss or gradients are not finite is named, kept, and stopped at or left out.

A step costs one reduction over the gradients and one number read back. Only after a bad step is the forward and
backward repeated with every module watched, from the same random state.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.training.nonfinite import find_source, finite, random_state

__all__ = ["NonFiniteStep", "WatchHook"]

Action = Literal["stop", "skip"]
KEPT = 10  # batches of a run


class NonFiniteStep(RuntimeError):
    """Training stopped before a step that would have spoilt the weights; the message names step, block and tensor."""


class WatchHook(Hook):
    """Looks at loss and gradients before every optimizer step, and never lets one through that is not finite.

    The batch of a bad step is kept as ``nonfinite/step_N.pth`` in the folder of the run; ``torch.load`` reads it with
    ``weights_only=True``. Weights, moments of the optimizer and running statistics of norms stay those before the step.
    A step that is skipped counts: data, schedule and moving averages of weights go on as if it had changed nothing.

    Under gradient accumulation every batch is looked at, and a bad one drops what was accumulated before it. Gradients
    that overflow under a loss scaler are its own matter, since it lowers its scale until they fit; the loss is watched.

    Args:
        action: "stop" to end the run with :class:`NonFiniteStep`, "skip" to leave the step out.
        limit: so many steps skipped in a row end the run too.

    Raises:
        ValueError: another action, or a limit below 1.
    """

    priority = "VERY_HIGH"  # running statistics are put back before other hooks average or save them

    def __init__(self, action: Action = "stop", limit: int = 10) -> None:
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {', '.join(get_args(Action))}; got {action!r}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1 step; got {limit}")
        self.action = action
        self.limit = limit
        self.in_a_row = 0
        self.handles = ExitStack()

    def before_train(self, runner: Any) -> None:
        self.task: BaseModel = runner.task
        self.statistics = [
            buffer
            for module in self.task.modules()
            if getattr(module, "track_running_stats", False)
            for buffer in module.buffers(recurse=False)
        ]
        self.before = [buffer.clone() for buffer in self.statistics]
        self.watching = True
        optimizer = runner.optim_wrapper.optimizer
        for handle in (
            self.task.register_forward_pre_hook(self.note_inputs, with_kwargs=True),
            self.task.register_forward_hook(self.note_losses, with_kwargs=True),
            optimizer.register_step_pre_hook(lambda *_: self.look(runner)),
        ):
            self.handles.callback(handle.remove)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.looked = False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.looked:  # no step was taken: gradients are accumulated, or a loss scaler left the step out
            self.look(runner)
        del self.inputs, self.loss  # the memory of a batch

    def after_train(self, runner: Any) -> None:
        self.handles.close()

    def note_inputs(self, task: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = signature(task.forward).bind(*arguments, **keywords).arguments
        if self.watching and given.get("mode") == "loss":
            self.inputs = given
            self.random_state = random_state()
            for kept, buffer in zip(self.before, self.statistics, strict=True):
                kept.copy_(buffer)

    def note_losses(
        self, task: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], losses: dict[str, Any]
    ) -> None:
        if self.watching and isinstance(losses, dict):
            with torch.no_grad():
                self.loss = self.task.parse_losses(losses)[0].detach()

    def look(self, runner: Any) -> None:
        """Lets a finite step through; of another one, drops the gradients, so that the optimizer changes nothing."""
        self.looked = True
        wrapper = runner.optim_wrapper
        gradients = [] if hasattr(wrapper, "loss_scaler") else gradients_of(self.task)
        bad = torch.tensor(int(not sound([self.loss, *gradients])), device=self.loss.device)
        all_reduce(bad, "max")  # every process takes the step, or none does
        if not bad:
            self.in_a_row = 0
            return
        what = "a gradient" if self.loss.isfinite() else f"the loss ({self.loss.item()})"
        wrapper.optimizer.zero_grad(set_to_none=True)
        report = f"step {runner.iter + 1}: {what} is not finite. {self.explain(runner)}"
        kept = self.keep(Path(runner.work_dir), runner.iter + 1, report)
        self.in_a_row += 1
        if self.action == "skip" and self.in_a_row < self.limit:
            runner.logger.error(f"{report} The step is skipped. {kept}")
            return
        self.handles.close()
        raise NonFiniteStep(
            f"{report} {kept}. Weights are as before the step. Go on from the last checkpoint with "
            "--resume and a lower learning rate, gradients clipped or float32"
            + ("" if self.action == "skip" else "; or default_hooks.watch.action=skip to leave such steps out")
        )

    def explain(self, runner: Any) -> str:
        """Where it began, by the same step once more; running statistics are left as before the step."""
        for kept, buffer in zip(self.before, self.statistics, strict=True):
            buffer.copy_(kept)
        if any(isinstance(parameter, DTensor) for parameter in self.task.parameters()):
            return "Parameters are sharded, so the block is not sought; repeat the step in one process for it."
        self.watching = False
        with runner.optim_wrapper.optim_context(self.task):
            source = find_source(self.task, self.inputs, random=self.random_state)
        self.watching = True
        for kept, buffer in zip(self.before, self.statistics, strict=True):
            buffer.copy_(kept)
        return f"First: {source}." if source else "Repeated in this process, the step is finite."

    def keep(self, work_dir: Path, step: int, report: str) -> str:
        """Writes what is needed to repeat the step, and says where; no more than KEPT batches, lest they fill the
        disk."""
        rank = get_rank()
        path = work_dir / "nonfinite" / f"step_{step}{f'_rank_{rank}' if rank else ''}.pth"
        path.parent.mkdir(exist_ok=True)
        content = {"step": step, "report": report, "batch": plain(self.inputs), "random_state": self.random_state}
        if len(list(path.parent.glob("step_*.pth"))) >= KEPT:
            return f"Its batch is not kept: {path.parent} holds {KEPT} already"
        write_atomically(path, lambda partial: torch.save(content, partial))
        return f"Its batch is in {path}"


def sound(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite. One norm says so at the cost of one reading; if it overflows, each is asked."""
    return bool(get_total_norm(tensors).isfinite()) or all(finite(tensor) for tensor in tensors)


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Gradients of the weights; of sharded ones, this process's part, which may have no element."""
    gradients = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    own = (gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients)
    return [gradient for gradient in own if gradient.numel()]


def plain(node: Any) -> Any:
    """What ``torch.load(weights_only=True)`` reads: tensors on the CPU and built-in types; of all else its text."""
    if isinstance(node, Tensor):
        return node.detach().as_subclass(Tensor).cpu()
    if isinstance(node, np.ndarray):
        return torch.from_numpy(node)
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    return node if isinstance(node, (bool, int, float, str, type(None))) else str(node)
