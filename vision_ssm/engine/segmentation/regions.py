"""Regions: classes taken together and overlapping, such as the whole tumour, its core and its enhancing part."""
# Shapes: b batch, k classes with background, r regions, s the grid.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.metrics import compute_dice
from torch import Tensor, nn

from vision_ssm.engine.metrics import StructureMetric

__all__ = ["RegionDice", "RegionLoss"]


class RegionLoss(nn.Module):
    """Dice loss of the regions plus the cross-entropy of the classes.

    A region's probability is the sum of its classes', so the network keeps one output a class, a region within another
    never is the more probable, and labels come from the most probable class as for any network.

    Args:
        regions: name -> its classes.

    Shapes: logits (b, k, s), labels (b, 1, s) -> ().
    """

    def __init__(self, regions: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.regions = [list(classes) for classes in regions.values()]
        self.dice = DiceLoss(batch=True)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        chances = logits.softmax(dim=1)
        regions = torch.stack([chances[:, classes].sum(dim=1) for classes in self.regions], dim=1)
        return self.dice(regions, inside(label, self.regions).to(regions)) + F.cross_entropy(logits, label[:, 0].long())


class RegionDice(StructureMetric):
    """Dice overlap of regions, 0 to 1. A region that neither map holds is left out of the means.

    Args:
        regions: name -> its classes.
    """

    default_prefix = "region_dice"

    def __init__(self, regions: Mapping[str, Sequence[int]]) -> None:
        super().__init__(tuple(regions))
        self.regions = [list(classes) for classes in regions.values()]

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        for sample in data_samples:
            prediction, label = (inside(sample[key][None].cpu(), self.regions) for key in ("prediction", "label"))
            self.results.append(compute_dice(prediction, label)[0].tolist())


def inside(label: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Classes (b, 1, s) -> whether a voxel lies in each region (b, r, s)."""
    return torch.cat([torch.isin(label, label.new_tensor(classes)) for classes in regions], dim=1)
