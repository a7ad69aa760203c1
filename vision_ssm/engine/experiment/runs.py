"""A comparison of networks under one budget: each trains for the same time, with several seeds, and is tested.

Every finished run is a JSON line; a run that has its line is not made again, so a comparison may stop and go on, and
may be shared among processes.
"""

import copy
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from vision_ssm.engine.benchmark.rows import Environment
from vision_ssm.engine.benchmark.timing import describe
from vision_ssm.engine.checkpoint import finite
from vision_ssm.engine.config import config_name
from vision_ssm.engine.tasks import count_parameters
from vision_ssm.engine.training.build import build_runner
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import evaluate

__all__ = ["Job", "Run", "jobs", "perform", "read_runs"]

UNCLOCKED = 3  # steps before the clock starts: kernels are compiled and chosen in them
WARM_UP = 0.1  # share of the time in which the learning rate rises
FAILURES = (RuntimeError, ValueError, ArithmeticError)  # of one run, after which the others still run


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to make.

    Attributes:
        config: name of the config.
        network: name among the config's entrants.
        seed: of the weights, the order and the variants of patches.
        seconds: wall clock of training.
    """

    config: str
    network: str
    seed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run(Job):
    """A finished run.

    Attributes:
        net: arguments that built the network, its type by name.
        parameters: trainable ones.
        steps: optimizer steps on the clock.
        s_per_step: mean time of a step, from a batch in memory to new weights; waiting for data is not counted.
        peak_gib: highest memory that training took on the device; None on a CPU.
        loss: mean training loss of the last tenth of the steps.
        scores: metric of every structure or generated frame, and their mean; None where one is not finite.
        notes: what the config says of its data.
        environment: where it was measured.
    """

    net: Mapping[str, Any]
    parameters: int
    steps: int
    s_per_step: float
    peak_gib: float | None
    loss: float
    scores: Mapping[str, float | None]
    notes: str
    environment: Environment

    @property
    def job(self) -> Job:
        return Job(config=self.config, network=self.network, seed=self.seed, seconds=self.seconds)

    @classmethod
    def from_json(cls, line: str) -> "Run":
        fields = json.loads(line)
        return cls(**{**fields, "environment": Environment(**fields["environment"])})


class Budget(Hook):
    """Trains for a time instead of a number of steps, with a learning rate that follows the clock.

    Args:
        seconds: of training, waiting for data included, after ``UNCLOCKED`` steps.
    """

    priority = "VERY_LOW"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps = 0
        self.elapsed = 0.0
        self.working = 0.0
        self._start = self._step = math.nan
        self._rates: list[float] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        groups = runner.optim_wrapper.param_groups
        if batch_idx == 0:
            self._rates = [group["lr"] for group in groups]
        if batch_idx == UNCLOCKED:
            synchronise()
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * share(self.elapsed / self.seconds)
        self._step = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if batch_idx < UNCLOCKED:
            return
        synchronise()
        self.steps += 1
        now = time.perf_counter()
        self.working += now - self._step
        self.elapsed = now - self._start
        runner.train_loop.stop_training = self.elapsed >= self.seconds


def share(progress: float) -> float:
    """Learning rate at a moment of the run, 0 to 1, relative to its highest: a linear rise, then a cosine to zero."""
    if progress < WARM_UP:
        return 0.1 + 0.9 * progress / WARM_UP
    return (1 + math.cos(math.pi * (min(progress, 1) - WARM_UP) / (1 - WARM_UP))) / 2


def synchronise() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def jobs(
    config: Config, *, seeds: Sequence[int], seconds: float, networks: Sequence[str] = (), share_of: str = "0/1"
) -> list[Job]:
    """The runs of a comparison, seed by seed, so that one cut short has seen every network.

    Args:
        config: with ``entrants``.
        networks: some of the entrants; all by default.
        share_of: such as 1/4: of every four runs the second, for one of four processes.

    Raises:
        ValueError: the config has no entrants or no such ones, the time is not positive, or there is no such share.
    """
    entrants = config.get("entrants")
    if not entrants:
        raise ValueError(f"config {config_name(config)} compares no networks; those under experiment/ have entrants")
    if unknown := [name for name in networks if name not in entrants]:
        raise ValueError(f"unknown networks {', '.join(unknown)}; the config has {', '.join(entrants)}")
    if not seconds > 0:
        raise ValueError(f"a run needs time to train; got {seconds} seconds")
    number, slash, total = share_of.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise ValueError(f"share {share_of!r} is not I/N with I from 0 to N - 1, such as 0/4")
    planned = [
        Job(config=config_name(config), network=network, seed=seed, seconds=seconds)
        for seed in seeds
        for network in (networks or entrants)
    ]
    return planned[int(number) :: int(total)]


def perform(
    config: Config,
    planned: Sequence[Job],
    out: Path,
    *,
    limit: float = math.inf,
    report: Callable[[str], object] = lambda line: None,
) -> tuple[list[Job], list[Job]]:
    """Makes the runs that ``out`` does not hold and appends a line for each.

    Args:
        out: file of JSON lines, made if need be.
        limit: seconds after which no run is begun; nor is one that would end later, by the longest run so far.
        report: given a line for every run as it ends.

    Returns:
        The runs that failed, and those that there was no time for.

    Raises:
        ValueError: ``out`` holds something else, or runs of the same names with another network or on another device.
    """
    start = time.perf_counter()
    finished = {run.job: run for run in read_runs(out)} if out.exists() else {}
    failed: list[Job] = []
    longest = 0.0
    for number, job in enumerate(planned):
        if job in finished:
            require_same(finished[job], network_of(config, job.network), out)
            report(f"{job.network}, seed {job.seed}: finished before")
            continue
        begun = time.perf_counter()
        if begun - start + max(longest, job.seconds) > limit:
            return failed, [late for late in planned[number:] if late not in finished]
        try:
            run = train_and_test(config, job)
        except FAILURES as error:
            failed.append(job)
            report(f"{job.network}, seed {job.seed}: failed: {error}")
        else:
            append(out, run)
            value = run.scores[config.score]
            score = f"{config.score} {'not finite' if value is None else format(value, '.4f')}"
            report(f"{job.network}, seed {job.seed}: {score} after {run.steps} steps of {run.s_per_step:.4f} s")
        longest = max(longest, time.perf_counter() - begun)
    return failed, []


def train_and_test(config: Config, job: Job) -> Run:
    """One run, in a folder of its own that is removed with its logs."""
    config = copy.deepcopy(config)
    object.__setattr__(config, "_format_python_code", False)  # its log is removed, and formatting takes a second
    net = network_of(config, job.network)
    config.model["net"] = net
    config.randomness["seed"] = job.seed
    config.train_dataloader["dataset"]["seed"] = job.seed
    config.train_cfg["max_iters"] = 10**9  # the clock ends it
    for key in ("val_cfg", "val_dataloader", "val_evaluator", "param_scheduler"):
        config.pop(key, None)
    config.default_hooks["checkpoint"] = None
    config.default_hooks["param_scheduler"] = None
    budget = Budget(job.seconds)
    try:
        with tempfile.TemporaryDirectory() as folder:
            runner = build_runner(config, Path(folder, "run"), hooks=(budget,))
            runner.train()
            peak = torch.cuda.max_memory_allocated() / 2**30 if device().type == "cuda" else None
            losses = [float(loss) for loss in runner.message_hub.get_scalar("train/loss").data[0]]
            task = runner.task.eval()
            return Run(
                **asdict(job),
                net=net,
                parameters=count_parameters(task.net),
                steps=budget.steps,
                s_per_step=budget.working / budget.steps,
                peak_gib=peak,
                loss=sum(losses[-max(budget.steps // 10, 1) :]) / max(budget.steps // 10, 1),
                scores=finite(evaluate(config, task)),
                notes=config.get("notes", ""),
                environment=describe(device()),
            )
    finally:
        gc.collect()
        if device().type == "cuda":
            torch.cuda.empty_cache()


def network_of(config: Config, name: str) -> dict[str, Any]:
    """What builds an entrant, as JSON and logs hold it: types by their names, an output for every class there is."""
    outputs = {"out_channels": len(config.classes) + 1} if "classes" in config else {}
    net = json.dumps(
        {**config.entrants[name], **outputs}, default=lambda kind: f"{kind.__module__}.{kind.__qualname__}"
    )
    described: dict[str, Any] = json.loads(net)
    return described


def require_same(run: Run, net: Mapping[str, Any], out: Path) -> None:
    if run.net != net:
        raise ValueError(
            f"{out} holds {run.network}, seed {run.seed}, built by {run.net}; the config says {net}. Give another file"
        )
    if run.environment.device != describe(device()).device:
        raise ValueError(
            f"{out} holds runs on {run.environment.device}; times compare on one device only. Give another file"
        )


def append(path: Path, run: Run) -> None:
    """Adds a whole line, in one write, so that several processes may share the file."""
    line = json.dumps(finite(asdict(run))) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def read_runs(path: Path) -> list[Run]:
    """The runs of a file, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of runs: {path}")
    return list(lines_of(path))


def lines_of(path: Path) -> Iterator[Run]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield Run.from_json(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is no run: {error}; remove it") from error
