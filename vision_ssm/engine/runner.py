"""mmengine's Runner, made to resume safely, to write checkpoints whole, and to train on a CPU as on a GPU."""

import io
import itertools
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.dist import barrier, get_dist_info, init_dist, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import CosineAnnealingLR, OneCycleLR, OptimWrapper
from mmengine.runner import Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.engine.checkpoint import (
    PARTIAL,
    find_checkpoint,
    load_into,
    read_checkpoint,
    require_fit,
    write_atomically,
)
from vision_ssm.engine.config import DATA_LOADERS, OWN_KEYS, build, resolve, settings
from vision_ssm.engine.hooks import InterruptHook, PlainStateHook, deferred_interrupt
from vision_ssm.engine.parallel import (
    GroupHook,
    gathered,
    is_sharded,
    optimizer_shares,
    replicated,
    send_buffers,
    shares,
    whole,
)

__all__ = ["AutocastOptimWrapper", "SafeRunner", "build_runner", "device", "join_group", "prepare_folder"]

SPANS = {OneCycleLR: "total_steps", CosineAnnealingLR: "end"}  # what says when a schedule ends


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


def prepare_folder(folder: Path, *, resume: bool = False) -> None:
    """Makes sure that a run may write to ``folder`` before any work starts.

    Raises:
        FileExistsError: it holds a run already and ``resume`` is off.
        PermissionError: it cannot be created or written.
    """
    for partial in folder.glob(f"{PARTIAL}*") if resume else ():  # of a run that was killed while it wrote
        partial.unlink()
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise FileExistsError(f"{folder} holds an earlier run; continue it with --resume or choose another --work-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}); choose another --work-dir") from error


def build_runner(
    config: Config, work_dir: Path, *, resume: str | None = None, hooks: tuple[Hook, ...] = ()
) -> SafeRunner:
    """The Runner of a config, on CUDA if there is a device, else on the CPU; one of several processes under torchrun.

    Args:
        config: from ``load_config``.
        work_dir: folder of logs and checkpoints; new or empty, unless it is resumed.
        resume: "latest" or "previous" checkpoint in ``work_dir`` to continue from, or the path of one.
        hooks: further hooks, such as a progress bar.

    Raises:
        FileExistsError, PermissionError: see ``prepare_folder``.
        FileNotFoundError: nothing to resume.
        ValueError: a run of this config could not be resumed, or it does not fit the processes that were started.
    """
    check_checkpoints(config)
    launcher = join_group(config.get("launcher"))
    checkpoint = find_checkpoint(work_dir, resume) if resume else None
    if is_main_process():
        goes_on = checkpoint is not None and checkpoint.parent.resolve() == work_dir.resolve()
        prepare_folder(work_dir, resume=goes_on)
    barrier()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    if "randomness" in config:
        set_random_seed(config.randomness.seed)  # the model is initialised before the Runner seeds
    name = Path(config.filename).stem
    group = (GroupHook(),) if launcher != "none" else ()
    runner = SafeRunner(
        cfg=config,
        **described_parts(config),
        custom_hooks=[*config.get("custom_hooks", ()), *group, PlainStateHook(), InterruptHook(), *hooks],
        work_dir=str(work_dir),
        launcher=launcher,
        resume=resume is not None,
        load_from=str(checkpoint) if checkpoint else None,
        # mmengine keeps one message hub a name and second: runs that start together must not share one.
        experiment_name=f"{name}_{uuid.uuid4().hex[:8]}",
    )
    if is_sharded(runner.task) and any(isinstance(hook, EMAHook) for hook in runner.hooks):
        raise ValueError("EMAHook copies whole models, and this one is sharded; train replicas, or without averages")
    return runner


def check_checkpoints(config: Config) -> None:
    """Raises ValueError if the config's checkpoints would not keep a run."""
    hook = (config.get("default_hooks") or {}).get("checkpoint") or {}
    if hook.get("max_keep_ckpts", -1) in (0, 1):
        raise ValueError(
            "default_hooks.checkpoint.max_keep_ckpts must be at least 2, or -1 for all: the oldest is removed before "
            "the newest is written"
        )
    steps = (config.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if hook.get("interval", -1) > 0 and hook["interval"] % steps:
        raise ValueError(
            f"default_hooks.checkpoint.interval must be a multiple of optim_wrapper.accumulative_counts, {steps}: "
            f"gradients that are being accumulated are not kept; got {hook['interval']}"
        )


def described_parts(config: Config) -> dict[str, Any]:
    """The Runner's arguments that a config gives: model, data and metrics as objects, the rest as it stands."""
    taken = {*OWN_KEYS, "custom_hooks", "work_dir", "launcher", "resume", "load_from", "experiment_name"}
    parts = {key: value for key, value in settings(config).items() if key not in taken}
    parts["model"] = build(config.model)
    for loader in DATA_LOADERS:
        if loader in config:
            parts[loader] = build_loader(config[loader])
    for evaluator in ("val_evaluator", "test_evaluator"):
        if evaluator in config:
            parts[evaluator] = build(config[evaluator])
    parts["param_scheduler"] = spanning(config.get("param_scheduler"), config.get("train_cfg"))
    return parts


def spanning(schedulers: Sequence[Mapping[str, Any]] | None, loop: Mapping[str, Any] | None) -> list[Any] | None:
    """Schedules that do not say where they end are given the whole run, so a run is shortened by one number.

    Raises:
        ValueError: one begins when the run has ended.
    """
    if schedulers is None or loop is None:
        return None
    steps = loop["max_iters"]
    for number, scheduler in enumerate(schedulers):
        if scheduler.get("begin", 0) >= steps:
            raise ValueError(
                f"param_scheduler.{number} begins at step {scheduler['begin']}, the run has {steps}; lengthen "
                "train_cfg.max_iters, or begin it sooner and end sooner the one before it"
            )
    ends = ({SPANS[one["type"]]: steps} if one["type"] in SPANS else {} for one in schedulers)
    return [{**end, **scheduler} for end, scheduler in zip(ends, schedulers, strict=True)]


def build_loader(options: Mapping[str, Any]) -> DataLoader[Any]:
    """A data loader from its config: ``dataset`` and keywords of torch's loader. Draws come in their own order."""
    dataset = build(options["dataset"])
    rank, world_size = get_dist_info()
    sampler = (
        DrawSampler(dataset, rank, world_size) if isinstance(dataset, Draws) else DefaultSampler(dataset, shuffle=False)
    )
    return DataLoader(dataset, sampler=sampler, **{key: value for key, value in options.items() if key != "dataset"})


def join_group(launcher: str | None = None) -> str:
    """Joins the processes that were started together: gloo on CPUs, NCCL on GPUs.

    Args:
        launcher: as mmengine calls it; by default "pytorch" under torchrun, else "none".

    Returns:
        The launcher.

    Raises:
        ValueError: it is not what started this process.
    """
    launched = torch.distributed.is_torchelastic_launched()
    launcher = launcher or ("pytorch" if launched else "none")
    if launcher in ("none", "pytorch") and launched != (launcher == "pytorch"):
        started = "torchrun started this process" if launched else "torchrun did not start this process"
        raise ValueError(f"launcher={launcher!r}, but {started}; leave launcher out, it is known by itself")
    if launcher != "none" and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            init_dist(launcher)
        else:  # mmengine would set a CUDA device
            torch.distributed.init_process_group("gloo")
    return launcher


def device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
