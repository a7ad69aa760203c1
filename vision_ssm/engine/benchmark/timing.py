"""How the benchmark takes time, memory and the description of the machine. It reads clocks and never sets them."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from .rows import Environment, Timing

__all__ = ["describe", "measure", "measure_steps"]

_ROUNDS = 3
_WARM_UP = 3
_SOURCE = Path(__file__)


def measure(work: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Times several pieces of work in turns, each for about ``seconds`` in all, after warming up."""
    peaks = {name: _peak_mib(run, device) for name, run in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(_ROUNDS):
        for name, run in work.items():
            times[name] += (
                _cuda_times(run, seconds / _ROUNDS) if device.type == "cuda" else _cpu_times(run, seconds / _ROUNDS)
            )
    clock = _clock_mhz(device)
    return {name: _timing(times[name], peaks[name], clock) for name in work}


def measure_steps(step: Callable[[], object], device: torch.device, steps: int) -> Timing:
    """Times so many steps, one after another, after warming up; for work that waits for that of other processes."""
    for _ in range(_WARM_UP):
        step()
    peak = _peak_mib(step, device)
    return _timing((_cuda_steps if device.type == "cuda" else _cpu_steps)(step, steps), peak, _clock_mhz(device))


def describe(device: torch.device) -> Environment:
    """The machine, the versions and the commit of a run."""
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=version("timm"),
        triton=_optional_version("triton"),
        numba=_optional_version("numba"),
        commit=_commit(),
    )


def _cpu_times(run: Callable[[], object], seconds: float) -> list[float]:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return [1e3 * taken for taken in timer.blocked_autorange(min_run_time=seconds).times]


def _cuda_times(run: Callable[[], object], seconds: float) -> list[float]:
    """Times by CUDA events, the cache emptied before each run; of a run longer than that, one and no more."""
    from triton.testing import do_bench

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    once = begin.elapsed_time(end)
    if once > 1e3 * seconds:
        return [once]
    return list(do_bench(run, rep=1e3 * seconds, return_mode="all"))


def _cpu_steps(step: Callable[[], object], steps: int) -> list[float]:
    moments = [time.perf_counter()]
    for _ in range(steps):
        step()
        moments.append(time.perf_counter())
    return [1e3 * (end - begin) for begin, end in pairwise(moments)]


def _cuda_steps(step: Callable[[], object], steps: int) -> list[float]:
    """From the end of a step to that of the next, as in training: nothing waits between them."""
    moments = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    moments[0].record()
    for moment in moments[1:]:
        step()
        moment.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(moments)]


def _timing(times_ms: list[float], peak_mib: float | None, clock_mhz: int | None) -> Timing:
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(
        median_ms=statistics.median(times_ms),
        p20_ms=fifths[0],
        p80_ms=fifths[-1],
        runs=len(times_ms),
        peak_mib=peak_mib,
        clock_mhz=clock_mhz,
    )


def _peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Highest device memory of a warm run; None on a CPU, where torch does not count it.

    Without the workspaces of cuBLAS, 32 MiB for every stream and thread of a process, whatever it multiplies.
    """
    run()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return (peak - held + torch.cuda.memory_allocated(device)) / 2**20


def _clock_mhz(device: torch.device) -> int | None:
    """Clock of the GPU's multiprocessors now, from nvidia-smi; None where it cannot be read."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    answer = _output("nvidia-smi", f"--id={gpu}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    return int(answer) if answer and answer.isdigit() else None


def _processor() -> str:
    """Name of the CPU; Linux gives it in /proc/cpuinfo only."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _optional_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """VISION_SSM_COMMIT (for a copy of a tree), else the commit of this file's repository, "+dirty" where changed."""
    if "VISION_SSM_COMMIT" in os.environ:
        return os.environ["VISION_SSM_COMMIT"]
    git = ("git", "-C", str(_SOURCE.parent))
    if shutil.which("git") and _output(*git, "ls-files", "--error-unmatch", _SOURCE.name):
        revision = _output(*git, "rev-parse", "--short=12", "HEAD")
        if revision:
            return f"{revision}+dirty" if _output(*git, "status", "--porcelain", "--untracked-files=no") else revision
    return "unknown"


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
