"""Several processes: replicas that share their gradients (DDP), or one model whose weights are shared out (FSDP).

``model_wrapper_cfg`` of a config names ``replicated`` or ``sharded``. The latter is torch's ``fully_shard``, not
mmengine's FlexibleRunner: that one is another Runner, whose checkpoints are neither written whole nor read safely, and
it flattens the weights. ``fully_shard`` keeps module, names and optimizer, so checkpoints are those of one process.
"""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = [
    "GroupHook",
    "gathered",
    "is_sharded",
    "optimizer_shares",
    "replicated",
    "send_buffers",
    "shard_units",
    "sharded",
    "shares",
    "whole",
]


def replicated(module: BaseModel, find_unused_parameters: bool = False) -> MMDistributedDataParallel:
    """A whole model on every process, with the mean of all gradients (DDP).

    Args:
        module: on the device of this process; starts with the main process's weights everywhere.
        find_unused_parameters: for networks some of whose parameters take no part in a step.
    """
    on_gpu = next(module.parameters()).is_cuda
    return MMDistributedDataParallel(
        module,
        device_ids=[torch.cuda.current_device()] if on_gpu else None,  # a CPU has no ids
        find_unused_parameters=find_unused_parameters,
    )


def sharded(module: BaseModel, unit: int = 1_000_000) -> BaseModel:
    """The model itself, each process with its share of every weight, gradient and optimizer state (FSDP).

    Args:
        module: on the device of this process; starts with the main process's weights everywhere.
        unit: parameters from which on a block is gathered on its own, while it computes; see ``shard_units``.
    """
    for tensor in module.state_dict().values():
        broadcast(tensor)
    mesh = init_device_mesh(next(module.parameters()).device.type, (get_world_size(),))
    for block in (*shard_units(module, unit), module):
        fully_shard(block, mesh=mesh)
    return module


def shard_units(module: nn.Module, unit: int) -> list[nn.Module]:
    """Blocks that are gathered on their own, inner ones first: items of lists with ``unit`` parameters to themselves.

    Only an item of a ``Sequential`` or ``ModuleList`` is sure to be called; of others the parent may read the weights.
    """
    lists = (nn.Sequential, nn.ModuleList)
    items = [item for parent in module.modules() if isinstance(parent, lists) for item in parent]
    taken: set[nn.Parameter] = set()
    units = []
    for item in reversed(items):  # parents come before their children
        own = set(item.parameters()) - taken
        if sum(parameter.numel() for parameter in own) >= unit and not isinstance(item, nn.ModuleList):
            taken |= own
            units.append(item)
    return units


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a share; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A tree with its tensors gathered, on the CPU; empty ones but on the main process, which alone writes them."""

    def kept(tensor: Tensor) -> Tensor:
        full = gathered(tensor)
        return full.cpu() if is_main_process() else full.new_empty(0)

    return apply_to(state, lambda leaf: isinstance(leaf, Tensor), kept)


def shares(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """This process's shares of whole tensors, shared out as their namesakes in ``like`` are; others as they are."""
    return {name: share(value, like.get(name)) for name, value in state.items()}


def optimizer_shares(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """As ``shares``, of an optimizer's state dict, whose entries are numbered as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {name: share(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def share(value: Any, like: Tensor | None) -> Any:
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


def send_buffers(module: nn.Module) -> None:
    """The main process's buffers for all: the last step left each with batch norms' statistics of its own."""
    for buffer in module.buffers():
        broadcast(buffer)


class GroupHook(Hook):
    """Processes as one: a step's losses are the mean over all of them, and validation sees one network.

    A sharded network stays gathered in validation: processes label cases of different sizes, so they call it at
    different times.
    """

    priority = "HIGHEST"

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        assert outputs
        means = torch.stack([value.detach().float() for value in outputs.values()])
        all_reduce(means, op="mean")
        outputs.update(zip(outputs, means, strict=True))

    def before_val_epoch(self, runner: Runner) -> None:
        send_buffers(runner.model)
        for block in sharded_blocks(runner.model):
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        for block in sharded_blocks(runner.model):
            block.set_reshard_after_forward(block is not runner.model, recurse=False)
            block.reshard()

    def after_train(self, runner: Runner) -> None:
        send_buffers(runner.model)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def sharded_blocks(module: nn.Module) -> list[FSDPModule]:
    return [block for block in module.modules() if isinstance(block, FSDPModule)]
