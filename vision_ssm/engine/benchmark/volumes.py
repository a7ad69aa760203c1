"""Segmentation networks in a benchmark: volumes forward, and forward with backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .jobs import BOTH, FORWARD, torch_name
from .timing import measure

__all__ = ["VolumeJob"]


@dataclass(frozen=True)
class VolumeJob:
    """Networks of a config, with fresh weights, on random volumes, in turns.

    Args:
        networks: names among the config's entrants.
        batch: volumes of one run.
        size: voxels along each side.
        config: whose entrants they are.
        channels: of the volumes.
        classes: of every voxel.
        autocast: the dtype of autocast, if any.
    """

    networks: tuple[str, ...]
    batch: int = 2
    size: int = 128
    config: str = "experiment/ct_abdomen"
    channels: int = 1
    classes: int = 6
    autocast: torch.dtype | None = torch.bfloat16

    @property
    def label(self) -> str:
        return f"{', '.join(self.networks)}: {self.size} voxels"

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of each row, all but the suite and the environment."""
        from vision_ssm.engine.config import build, load_config  # they need mmengine, which other suites do not

        entrants = load_config(self.config).entrants
        networks: dict[str, nn.Module] = {
            name: build(dict(entrants[name], in_channels=self.channels, out_channels=self.classes)).to(device)
            for name in self.networks
        }
        shape = (self.batch, self.channels, *(self.size,) * 3)
        volume = torch.randn(shape, device=device)
        label = torch.randint(self.classes, (self.batch, *shape[2:]), device=device)
        step: Callable[..., object]
        for direction, step in ((FORWARD, infer), (BOTH, train_step)):
            for network in networks.values():
                network.train(direction == BOTH)
            work = {name: partial(step, net, volume, label, self.autocast) for name, net in networks.items()}
            for name, timing in measure(work, device, seconds).items():
                yield {
                    "subject": name,
                    "case": f"{self.size}^3 voxels",
                    "batch": self.batch,
                    "direction": direction,
                    "dtype": torch_name(self.autocast or torch.float32),
                    "layout": torch_name(torch.contiguous_format),
                    "timing": timing,
                    "accuracy": None,
                }


def infer(net: nn.Module, volume: Tensor, label: Tensor, autocast: torch.dtype | None) -> None:
    """Takes what ``train_step`` takes, whose label it has no use for."""
    with torch.inference_mode(), torch.autocast(volume.device.type, autocast, enabled=autocast is not None):
        net(volume)


def train_step(net: nn.Module, volume: Tensor, label: Tensor, autocast: torch.dtype | None) -> None:
    """Forward and backward of the cross entropy, without an optimizer."""
    net.zero_grad()
    with torch.autocast(volume.device.type, autocast, enabled=autocast is not None):
        logits = net(volume)
    F.cross_entropy(logits.float(), label).backward()
