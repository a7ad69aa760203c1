"""Segmentation networks in a benchmark: volumes forward, and forward with backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .jobs import BOTH, FORWARD, infer, torch_name, train_step
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
        autocast: the dtype of autocast, if any.
    """

    networks: tuple[str, ...]
    batch: int = 2
    size: int = 128
    config: str = "experiment/ct_abdomen"
    autocast: torch.dtype | None = torch.bfloat16

    @property
    def label(self) -> str:
        return f"{', '.join(self.networks)}: {self.size} voxels"

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of each row, all but the suite and the environment."""
        from vision_ssm.engine.config import build, load_config  # they need mmengine, which other suites do not

        config = load_config(self.config)
        entrants = {name: dict(config.entrants[name], out_channels=len(config.classes) + 1) for name in self.networks}
        networks: dict[str, nn.Module] = {name: build(entrant).to(device) for name, entrant in entrants.items()}
        (channels,) = {entrant["in_channels"] for entrant in entrants.values()}
        volume = torch.randn(self.batch, channels, *(self.size,) * 3, device=device)
        for direction, step in ((FORWARD, infer), (BOTH, train_step)):
            for network in networks.values():
                network.train(direction == BOTH)
            work = {name: partial(step, network, volume, self.autocast) for name, network in networks.items()}
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
