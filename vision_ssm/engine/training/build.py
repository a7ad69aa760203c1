"""From a config to the Runner, its data and its schedules."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.dist import barrier, get_dist_info, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import CosineAnnealingLR, OneCycleLR
from mmengine.runner import set_random_seed
from torch.utils.data import DataLoader

from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.engine.checkpoint import PARTIAL, find_checkpoint, make_writable
from vision_ssm.engine.config import DATA_LOADERS, OWN_KEYS, build, settings
from vision_ssm.engine.tasks import ChecksItems
from vision_ssm.engine.training.device import join_group
from vision_ssm.engine.training.hooks import InterruptHook, PlainStateHook
from vision_ssm.engine.training.parallel import GroupHook, is_sharded
from vision_ssm.engine.training.runner import SafeRunner

__all__ = ["build_runner", "prepare_folder"]

SPANS = {OneCycleLR: "total_steps", CosineAnnealingLR: "end"}  # what says when a schedule ends


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
    make_writable(folder)


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
    if isinstance(task := parts["model"], ChecksItems):
        for loader in ("val_dataloader", "test_dataloader"):
            if loader in parts:
                task.check_item(parts[loader].dataset[0])
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
