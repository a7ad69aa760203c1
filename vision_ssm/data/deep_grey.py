"""The embedded brain: one real T1 image and six deep-grey structures, with its halves as train and test set."""

from collections.abc import Hashable, Mapping
from importlib.resources import files
from typing import Any, Literal

import torch
from monai.transforms import MapTransform
from nibabel import aff2axcodes

__all__ = ["STRUCTURES", "Hemisphered", "deep_grey_files"]

STRUCTURES = ("hippocampus", "amygdala", "caudate", "putamen", "pallidum", "thalamus")


def deep_grey_files() -> list[dict[str, str]]:
    """Paths of the image and its labels (see NOTICE beside them): one dictionary for MONAI's datasets."""
    folder = files("vision_ssm.data") / "brain_deep_grey"
    return [{"image": str(folder / "colin27_t1.nii.gz"), "label": str(folder / "colin27_aal6.nii.gz")}]


class Hemisphered(MapTransform):
    """Keeps one half of a brain, the right one mirrored so that it lies like the left.

    The halves meet at x = 0 mm of a volume whose first axis runs from left to right: (c, x, y, z) -> (c, x / 2, y, z).

    Raises:
        ValueError: the first axis does not run from left to right, or x = 0 mm is outside the volume.
    """

    def __init__(self, keys: str | tuple[str, ...], side: Literal["left", "right"]) -> None:
        super().__init__(keys)
        if side not in ("left", "right"):
            raise ValueError(f"unknown side {side!r}; sides are left and right")
        self.side = side

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = data[key]
            middle = midline(volume.affine, volume.shape[1])
            plain = volume.as_tensor()
            data[key] = plain[:, :middle] if self.side == "left" else plain[:, middle:].flip(1)
        return data


def midline(affine: torch.Tensor, size: int) -> int:
    """Index of the first sagittal plane at x >= 0 mm."""
    axes = aff2axcodes(affine.numpy())
    middle = round(float(-affine[0, 3] / affine[0, 0]))
    if axes[0] != "R" or not 0 < middle < size:
        raise ValueError(
            f"axes {axes} and midline at voxel {middle} of {size}: halves need a first axis that runs from left to "
            "right across x = 0 mm; use Orientationd(axcodes='RAS') first"
        )
    return middle
