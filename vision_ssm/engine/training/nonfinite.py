"""Where numbers first cease to be finite: a training step again, with every module watched."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

__all__ = ["Source", "find_source"]


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


def random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
