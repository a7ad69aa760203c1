"""A soak: many training steps, each on images of another size, watched for NaN, growing memory and recompilation."""

import mmap
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from vision_ssm.engine.benchmark.rows import Environment
from vision_ssm.engine.benchmark.timing import describe

__all__ = ["Soak", "soak"]

CLASSES = 4
SLOW = 10.0  # times the median: so much takes a step that compiles, not one on a larger image


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What a soak saw. Lists have an entry for each quarter of the steps.

    Attributes:
        environment: where it ran.
        backbone: timm name of the network that was trained.
        steps: training steps.
        sizes: smallest and largest side of an image in pixels.
        batch: images of a step.
        compiled: backend of torch.compile that compiled the network for any size; None if none did.
        distinct_sizes: how many sizes were drawn.
        not_finite: steps whose loss or weights were not finite.
        loss: mean loss.
        memory_mib: highest memory held between steps: of the device, or of the process on a CPU.
        median_ms: of a step.
        slow_steps: steps that took more than ten times the median of all.
        graphs: graphs that were compiled.
    """

    environment: Environment
    backbone: str
    steps: int
    sizes: tuple[int, int]
    batch: int
    compiled: str | None
    distinct_sizes: int
    not_finite: int
    loss: list[float]
    memory_mib: list[float]
    median_ms: list[float]
    slow_steps: list[int]
    graphs: list[int]

    def complaints(self) -> list[str]:
        """What is not in order; the first quarter may compile, and fill the allocator and the tables of routes."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite} steps were not finite")
        if any(later > 1.02 * earlier for earlier, later in pairwise(self.memory_mib[2:])):
            found.append(f"memory grew: {self.memory_mib} MiB in the quarters")
        if sum(self.graphs[1:]):
            found.append(f"graphs were compiled after the first quarter: {self.graphs}")
        if sum(self.slow_steps[1:]) > 0.01 * self.steps:
            found.append(f"steps became slow after the first quarter: {self.slow_steps}")
        return found


def soak(
    backbone: str = "vmamba_tiny",
    *,
    steps: int,
    sizes: tuple[int, int],
    batch: int,
    device: torch.device,
    compiled: str | None = None,
    seed: int = 0,
) -> Soak:
    """Trains a classifier on random images whose sides change with every step, in bfloat16 where the device is a GPU.

    Args:
        backbone: timm name, this package's or another.
        steps: training steps.
        sizes: smallest and largest side of an image in pixels.
        batch: images of a step.
        device: where to train.
        compiled: backend of torch.compile, such as "inductor", to compile the network for any size.
        seed: of weights, images and sizes.

    Raises:
        ValueError: fewer than four steps, or sizes that are none.
        RuntimeError: timm knows no such backbone.
    """
    if steps < 4:
        raise ValueError(f"steps must be at least 4, one for each quarter; got {steps}")
    if not 1 <= sizes[0] <= sizes[1]:
        raise ValueError(f"sizes must be the smallest and the largest side, at least 1; got {sizes}")
    torch.manual_seed(seed)
    draw = random.Random(seed)
    net = timm.create_model(backbone, num_classes=CLASSES).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    forward: Callable[..., Tensor] = torch.compile(net, dynamic=True, backend=compiled) if compiled else net
    losses, memory, seconds, graphs, drawn, bad = [], [], [], [], set(), 0
    for _ in range(steps):
        drawn.add(size := (draw.randint(*sizes), draw.randint(*sizes)))
        image = torch.randn(batch, 3, *size, device=device)
        label = torch.randint(CLASSES, (batch,), device=device)
        before = compilations()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(forward(image).float(), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        bad += not all(bool(m.isfinite().all()) for m in (loss, *net.parameters()))
        del image, label, loss
        memory.append(held(device) / 2**20)
        graphs.append(compilations() - before)
    median = statistics.median(seconds)
    quarters = [slice(steps * i // 4, steps * (i + 1) // 4) for i in range(4)]
    return Soak(
        environment=describe(device),
        backbone=backbone,
        steps=steps,
        sizes=sizes,
        batch=batch,
        compiled=compiled,
        distinct_sizes=len(drawn),
        not_finite=bad,
        loss=[statistics.fmean(losses[quarter]) for quarter in quarters],
        memory_mib=[max(memory[quarter]) for quarter in quarters],
        median_ms=[1e3 * statistics.median(seconds[quarter]) for quarter in quarters],
        slow_steps=[sum(value > SLOW * median for value in seconds[quarter]) for quarter in quarters],
        graphs=[sum(graphs[quarter]) for quarter in quarters],
    )


def compilations() -> int:
    """Graphs that torch.compile has made so far."""
    return counters["stats"]["unique_graphs"]


def held(device: torch.device) -> int:
    """Bytes that are in use: tensors on a GPU, pages of the process on a CPU; 0 where neither can be read."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * mmap.PAGESIZE if pages.exists() else 0
