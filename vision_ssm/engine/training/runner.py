"""mmengine's Runner, made to resume safely, to write checkpoints whole, and to train on a CPU as on a GPU."""

import io
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from vision_ssm.data.draws import DrawSampler
from vision_ssm.engine.checkpoint import (
    load_into,
    read_checkpoint,
    require_fit,
    write_atomically,
)
from vision_ssm.engine.config import build, resolve
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.hooks import deferred_interrupt
from vision_ssm.engine.training.parallel import (
    gathered,
    is_sharded,
    optimizer_shares,
    replicated,
    send_buffers,
    shares,
    whole,
)

__all__ = ["AutocastOptimWrapper", "SafeRunner"]


class AutocastOptimWrapper(OptimWrapper):
    """Runs the forward pass in bfloat16 where that is safe, on any device.

    mmengine's own wrapper refuses a CPU. bfloat16 has float32's range, so no loss scaling is needed.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


class SafeRunner(Runner):
    """A Runner whose checkpoints are written whole, read safely and loaded strictly."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        # The config is logged and written by now. Each checkpoint holds its text as well, and formatting that takes
        # longer than writing the checkpoint.
        object.__setattr__(self.cfg, "_format_python_code", False)

    @property
    def task(self) -> BaseModel:
        """The task that is trained, without the wrapper that shares gradients among processes."""
        task = getattr(self.model, "module", self.model)
        assert isinstance(task, BaseModel)
        return task

    def train(self) -> nn.Module:
        with deferred_interrupt() as self.interrupt:
            return super().train()

    def wrap_model(self, model_wrapper_cfg: Mapping[str, Any] | None, model: BaseModel) -> nn.Module:
        """Puts the model on ``device()``; if several processes train, ``model_wrapper_cfg`` says how they share it.

        Its ``type`` is called with the model and the other entries: ``replicated``, by default, or ``sharded``.
        """
        model.init_weights()
        model = model.to(device())
        if not self.distributed:
            return model
        options = dict(model_wrapper_cfg or {"type": replicated})
        wrapped: nn.Module = resolve(options.pop("type"))(model, **options)
        return wrapped

    def _init_model_weights(self) -> None:
        """Nothing: ``wrap_model`` did it, since a share of a weight can be neither filled nor sent as the whole."""

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: Mapping[str, Any] | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: Mapping[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes all that a run needs to go on; the file appears under its name when it is complete.

        Every process must call it, the main one writes. Arguments are mmengine's; files are local ones.

        Raises:
            OSError: it cannot be written; the checkpoints before it are as they were.
            ValueError: a storage other than local files is asked for.
        """
        if file_client_args or backend_args:
            raise ValueError("checkpoints are local files; leave out file_client_args and backend_args")
        send_buffers(self.task)
        checkpoint: dict[str, Any] = {
            "meta": {
                "epoch": self.epoch + by_epoch,
                "iter": self.iter + (not by_epoch),
                "cfg": self.cfg.pretty_text,
                "seed": self.seed,
                "experiment_name": self.experiment_name,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                **(meta or {}),
            },
            "state_dict": whole(self.task.state_dict()),
            "message_hub": self.message_hub.state_dict(),
        }
        if save_optimizer:
            checkpoint["optimizer"] = whole(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        if is_main_process():
            write_checkpoint(Path(out_dir, filename), checkpoint)
        barrier()  # a process that ended before would end them all, and the file half-way

    def load_checkpoint(self, filename: str, map_location: Any = "cpu") -> dict[str, Any]:
        """Loads a checkpoint of this very model, to go on from.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, of another model, or lacks what a run needs to
                go on; nothing is changed then.
        """
        path = Path(filename)
        checkpoint = read_checkpoint(path)
        require_fit(self.task, checkpoint["state_dict"], path)
        self.require_resumable(checkpoint, path)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)  # averages and weights may change places
        load_into(self.task, shares(checkpoint["state_dict"], self.task.state_dict()), path)
        checkpoint["optimizer"] = optimizer_shares(checkpoint["optimizer"], self.optim_wrapper.optimizer)
        self._has_loaded = True
        return checkpoint

    def require_resumable(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Raises ValueError if the run could not go on as if it had never stopped."""
        missing = {"meta", "message_hub", "optimizer", "random_states"} - checkpoint.keys()
        if missing:
            raise ValueError(
                f"{path} holds no {', '.join(sorted(missing))}, so training cannot go on from it; give a checkpoint "
                "iter_*.pth that `vision-ssm train` wrote"
            )
        before = len(checkpoint["random_states"])
        if before != self.world_size:
            raise ValueError(
                f"{path} is of {before} processes, and this run has {self.world_size}; start as many, since each goes "
                "on with its own data and random numbers"
            )
        averages = any(isinstance(hook, EMAHook) for hook in self.hooks)
        if averages != ("ema_state_dict" in checkpoint):
            held, here = ("no averages", "has") if averages else ("averages", "lacks")
            raise ValueError(
                f"{path} holds {held} of the weights, and the config {here} an EMAHook; resume with the same"
            )

    def resume(self, filename: str, *arguments: Any, **options: Any) -> None:
        """As mmengine's, but draws that were made before are skipped instead of made again."""
        super().resume(filename, *arguments, **options)
        loader = self.train_loop.dataloader
        if isinstance(loader.sampler, DrawSampler):
            loader.sampler.start = self.iter * loader.batch_size * self.world_size
            self.train_loop.dataloader_iterator = itertools.chain(itertools.repeat(None, self.iter), loader)

    def finish(self) -> BaseModel:
        """What training made, whole on every process and in evaluation mode: the averaged weights if a hook averages.

        Call it once, after training; weights and averages have changed places then.
        """
        for hook in self.hooks:
            if isinstance(hook, EMAHook):
                hook.before_test_epoch(self)
        if not is_sharded(self.task):
            return self.task.eval()
        state = {name: gathered(tensor) for name, tensor in self.task.state_dict().items()}
        task: BaseModel = build(self.cfg.model)
        task.load_state_dict(state)
        return task.to(device()).eval()


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    content = io.BytesIO()
    torch.save(checkpoint, content)  # to memory, since its writer of files hides why one cannot be written
    try:
        write_atomically(path, lambda partial: partial.write_bytes(content.getbuffer()))
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror or error}); the checkpoints before it are whole. Free space, then "
            "repeat the command with --resume"
        ) from error
