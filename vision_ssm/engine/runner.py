"""mmengine's Runner, made to resume safely, to write checkpoints whole, and to train on a CPU as on a GPU."""

import itertools
import tempfile
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
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import CosineAnnealingLR, OneCycleLR, OptimWrapper
from mmengine.runner import Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.engine.checkpoint import latest_checkpoint, load_into, read_checkpoint, write_atomically
from vision_ssm.engine.config import DATA_LOADERS, OWN_KEYS, build, settings
from vision_ssm.engine.hooks import InterruptHook, PlainStateHook, deferred_interrupt

__all__ = ["AutocastOptimWrapper", "SafeRunner", "build_runner", "device", "prepare_folder"]

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

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Puts the model on ``device()``, and shares its gradients if several processes train.

        mmengine alone would also choose accelerators that lack our operators, and name device ids on a CPU.
        """
        if not self.distributed:
            return model.to(device())
        if device().type == "cpu":
            return MMDistributedDataParallel(model, device_ids=None)
        return super().wrap_model(model_wrapper_cfg, model)

    def save_checkpoint(self, out_dir: str, filename: str, *arguments: Any, **options: Any) -> None:
        """Same arguments as mmengine's; the file appears under its name when it is complete."""
        if is_main_process():
            save = super().save_checkpoint
            write_atomically(
                Path(out_dir, filename), lambda partial: save(out_dir, partial.name, *arguments, **options)
            )

    def load_checkpoint(self, filename: str, map_location: Any = "cpu") -> dict[str, Any]:
        """Loads a checkpoint of this very model.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, or of another model; nothing is changed then.
        """
        checkpoint = read_checkpoint(Path(filename))
        load_into(self.task, checkpoint["state_dict"], Path(filename))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        self._has_loaded = True
        return checkpoint

    def resume(self, filename: str, *arguments: Any, **options: Any) -> None:
        """As mmengine's, but draws that were made before are skipped instead of made again."""
        super().resume(filename, *arguments, **options)
        loader = self.train_loop.dataloader
        if isinstance(loader.sampler, DrawSampler):
            loader.sampler.start = self.iter * loader.batch_size * self.world_size
            self.train_loop.dataloader_iterator = itertools.chain(itertools.repeat(None, self.iter), loader)


def prepare_folder(folder: Path, *, resume: bool = False) -> None:
    """Makes sure that a run may write to ``folder`` before any work starts.

    Raises:
        FileExistsError: it holds a run already and ``resume`` is off.
        PermissionError: it cannot be created or written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise FileExistsError(f"{folder} holds an earlier run; continue it with --resume or choose another --work-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}); choose another --work-dir") from error


def build_runner(config: Config, work_dir: Path, *, resume: bool = False, hooks: tuple[Hook, ...] = ()) -> SafeRunner:
    """The Runner of a config, on CUDA if there is a device, else on the CPU.

    Args:
        config: from ``load_config``.
        work_dir: folder of logs and checkpoints; new or empty, unless ``resume``.
        resume: continue from the latest checkpoint in ``work_dir``.
        hooks: further hooks, such as a progress bar.

    Raises:
        FileExistsError, PermissionError: see ``prepare_folder``.
        FileNotFoundError: nothing to resume.
    """
    join_group(config.get("launcher", "none"))
    if is_main_process():
        prepare_folder(work_dir, resume=resume)
    barrier()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    checkpoint = str(latest_checkpoint(work_dir)) if resume else None
    if "randomness" in config:
        set_random_seed(config.randomness.seed)  # the model is initialised before the Runner seeds
    name = Path(config.filename).stem
    return SafeRunner(
        cfg=config,
        **described_parts(config),
        custom_hooks=[*config.get("custom_hooks", ()), PlainStateHook(), InterruptHook(), *hooks],
        work_dir=str(work_dir),
        resume=resume,
        load_from=checkpoint,
        # mmengine keeps one message hub a name and second: runs that start together must not share one.
        experiment_name=f"{name}_{uuid.uuid4().hex[:8]}",
    )


def described_parts(config: Config) -> dict[str, Any]:
    """The Runner's arguments that a config gives: model, data and metrics as objects, the rest as it stands."""
    taken = {*OWN_KEYS, "custom_hooks", "work_dir", "resume", "load_from", "experiment_name"}
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


def join_group(launcher: str) -> None:
    """Joins the processes that torchrun started: through gloo without a GPU, where mmengine would set a CUDA device."""
    if launcher == "none" or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        init_dist(launcher)
    else:
        torch.distributed.init_process_group("gloo")


def device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
