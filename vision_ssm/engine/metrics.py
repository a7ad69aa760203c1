"""Metrics for mmengine's evaluator, computed by MONAI."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks import one_hot
from torch import Tensor

__all__ = ["HD95", "Accuracy", "Dice"]


class StructureMetric(BaseMetric):
    """A number per structure and volume, averaged over volumes; ``mean`` averages the structures.

    Args:
        structures: names of the classes 1, 2, ...; class 0 is background and not scored.
    """

    def __init__(self, structures: Sequence[str]) -> None:
        super().__init__()
        self.structures = tuple(structures)

    def score(self, prediction: Tensor, label: Tensor) -> Tensor:
        """One-hot (1, classes, x, y, z) twice -> (structures,)."""
        raise NotImplementedError

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        classes = len(self.structures) + 1
        for sample in data_samples:
            pair = (one_hot(sample[key][None].cpu(), classes) for key in ("prediction", "label"))
            self.results.append(self.score(*pair).tolist())

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        scores = torch.tensor(results).nanmean(dim=0)
        named = dict(zip(self.structures, scores.tolist(), strict=True))
        return named | {"mean": float(scores.nanmean())}


class Dice(StructureMetric):
    """Dice overlap, 0 to 1. A structure that neither map holds is left out of the means."""

    default_prefix = "dice"

    def score(self, prediction: Tensor, label: Tensor) -> Tensor:
        return compute_dice(prediction, label, include_background=False)[0]


class HD95(StructureMetric):
    """95th percentile of the distance between surfaces, in millimetres; infinite if a structure was not found.

    Args:
        structures: as for every metric here.
        spacing: millimetres between voxels along x, y and z.
    """

    default_prefix = "hd95"

    def __init__(self, structures: Sequence[str], spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__(structures)
        self.spacing = tuple(spacing)

    def score(self, prediction: Tensor, label: Tensor) -> Tensor:
        with warnings.catch_warnings():  # MONAI 1.6 passes its own deprecated argument
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*is all 0")  # the result says so: infinite, or absent
            distance = compute_hausdorff_distance(prediction, label, percentile=95, spacing=self.spacing)[0]
        found = prediction[0, 1:].flatten(1).any(dim=1) == label[0, 1:].flatten(1).any(dim=1)
        return torch.where(found, distance, torch.full_like(distance, math.inf))


class Accuracy(BaseMetric):
    """Share of images whose class is right, 0 to 1."""

    default_prefix = "accuracy"

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        self.results += [bool(sample["prediction"] == sample["label"]) for sample in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"top1": sum(results) / len(results)}
