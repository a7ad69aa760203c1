"""Watched numbers: a step whose loss or gradients are not finite is named, kept, and stopped at or left out.

A step costs one reduction over the gradients and one number read back. Only after a bad step is the forward and
backward repeated with every module watched, from the same random state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

__all__ = ["NonFiniteStep", "Source", "WatchHook", "find_source"]

Action = Literal["stop", "skip"]


class NonFiniteStep(RuntimeError):
    """Training stopped before a step that would have spoilt the weights; the message names step, block and tensor."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers first ceased to be finite.

    Attributes:
        block: dotted name of the module in the task, such as "net.encoder.stages_1.blocks.0.mixer"; "batch" and "loss"
            stand for what goes into the task and for what it returns.
        kind: class of the module; "" for batch and loss.
        tensor: what of it, such as "output", "weight", "gradient of the input", or the name of an input or a loss.
        dtype: of that tensor.
    """

    block: str
    kind: str
    tensor: str
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        return f"{self.tensor} of {self.block}{kind}, {str(self.dtype).removeprefix('torch.')}"


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
            runner.logger.error(f"{report} The step is skipped; its batch is in {kept}")
            return
        self.handles.close()
        raise NonFiniteStep(
            f"{report} Its batch is in {kept}; weights are as before the step. Go on from the last checkpoint with "
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

    def keep(self, work_dir: Path, step: int, report: str) -> Path:
        """Writes what is needed to repeat the step; no more than ``limit`` batches, lest they fill the disk."""
        rank = get_rank()
        path = work_dir / "nonfinite" / f"step_{step}{f'_rank_{rank}' if rank else ''}.pth"
        path.parent.mkdir(exist_ok=True)
        content = {"step": step, "report": report, "batch": plain(self.inputs), "random_state": self.random_state}
        if len(list(path.parent.glob("step_*.pth"))) >= self.limit:
            return path.parent.with_name("nonfinite")
        write_atomically(path, lambda partial: torch.save(content, partial))
        return path


def find_source(
    task: BaseModel, batch: Mapping[str, Any], *, random: Mapping[str, Tensor] | None = None
) -> Source | None:
    """Runs a training step without its end, and finds where a number first is not finite. Changes no gradient.

    Args:
        task: in training mode, on the batch's device. Running statistics of its norms move, as in any step.
        batch: what the task's forward takes by name, with ``mode="loss"``, such as the "batch" of a kept file.
        random: random state to start from, such as the "random_state" of a kept file; that of now by default.

    Returns:
        The first in order: the batch, a weight, the output of a block, a loss, a gradient; None if all are finite.
    """
    for name, value in batch.items():
        if isinstance(value, Tensor) and not finite(value):
            return Source(block="batch", kind="", tensor=name, dtype=value.dtype)
    for name, module in task.named_modules():
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not finite(tensor):
                return Source(block=name, kind=type(module).__name__, tensor=own, dtype=tensor.dtype)
    watcher = Watcher(task)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), watcher.attached():
        if random is not None:
            set_random_state(random)
        losses = task(**batch)
        if watcher.found is None:
            for name, value in losses.items():
                if isinstance(value, Tensor) and not finite(value):
                    return Source(block="loss", kind="", tensor=name, dtype=value.dtype)
        with torch.autocast(next(task.parameters()).device.type, enabled=False):
            loss, _ = task.parse_losses(losses)
            weights = [parameter for parameter in task.parameters() if parameter.requires_grad]
            if watcher.found is None:
                # Not backward(): that would add to the gradients, and wake what waits for them to be shared.
                torch.autograd.grad(loss, weights, allow_unused=True)
    return watcher.found


class Watcher:
    """Looks at every output of every module of a network, at its gradient, and at the gradients of the weights."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.found: Source | None = None
        self.users: dict[int, str] = {}  # the innermost module that takes a tensor, by the tensor's id
        self.seen: list[Tensor] = []  # kept, so that no id is used again

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as handles:
            for name, module in self.root.named_modules():
                if not name:
                    continue
                before = module.register_forward_pre_hook(self.before(name))
                after = module.register_forward_hook(self.after(name))
                handles.callback(before.remove)
                handles.callback(after.remove)
                for own, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad:
                        handle = parameter.register_hook(self.weight(name, own))
                        handles.callback(handle.remove)
            yield

    def before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor in tensors(inputs):
                if tensor.requires_grad:
                    known = id(tensor) in self.users
                    self.users[id(tensor)] = name
                    if not known:
                        self.follow(tensor, name)

        return hook

    def after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for tensor in tensors(output):
                if self.found is None and not finite(tensor):
                    self.found = self.source(name, "output", tensor)
                if tensor.requires_grad:
                    self.follow(tensor, name.rpartition(".")[0])  # what follows is done by the parent, or by another

        return hook

    def follow(self, tensor: Tensor, otherwise: str) -> None:
        self.seen.append(tensor)

        def hook(gradient: Tensor) -> None:
            if self.found is None and not finite(gradient):
                user = self.users.get(id(tensor), otherwise)
                self.found = self.source(user, "gradient of the input", gradient)

        tensor.register_hook(hook)

    def weight(self, name: str, own: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.found is None and not finite(gradient):
                self.found = self.source(name, f"gradient of {own}", gradient)

        return hook

    def source(self, name: str, tensor: str, value: Tensor) -> Source:
        if not name:
            return Source(block="loss", kind="", tensor=tensor, dtype=value.dtype)
        kind = type(self.root.get_submodule(name)).__name__
        return Source(block=name, kind=kind, tensor=tensor, dtype=value.dtype)


def tensors(node: Any) -> Iterator[Tensor]:
    """The floating tensors in an argument or an output."""
    if isinstance(node, Tensor):
        if node.is_floating_point() or node.is_complex():
            yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from tensors(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from tensors(value)


def finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def sound(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite. One norm says so at the cost of one reading; if it overflows, each is asked."""
    return bool(get_total_norm(tensors).isfinite()) or all(finite(tensor) for tensor in tensors)


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Gradients of the weights; of sharded ones, this process's part, which may have no element."""
    gradients = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    own = (gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients)
    return [gradient for gradient in own if gradient.numel()]


def random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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
