"""Random patches of prepared volumes and slices, through MONAI's dictionary transforms."""
# Shapes: c channels, s the grid of an item: x y of a slice, x y z of a volume.

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    EnsureTyped,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SelectItemsd,
    SpatialPadd,
)
from torch import Tensor

from vision_ssm.data.draws import Draws

__all__ = ["Patches"]

BOTH = ("image", "label")
KEPT = 10_000  # centres of each kind that an item keeps: 80 kB, where all those of a large CT are 600 MB


class Patches(Draws):
    """Patches of one size, every second one about a labelled voxel, each moved and changed a little.

    Items smaller than a patch are padded with zeros. One that is all background, or all labelled, is drawn from
    anywhere. What a draw is depends on its number and the seed alone, see ``Draws``.

    Args:
        items: prepared, with tensors of one grid under ``image`` (c, s) and ``label`` (1, s); all are held in memory.
        size: of a patch, along each axis of s.
        rotate: largest angle about each axis, in radians.
        scale: largest relative change of size along each axis.
        mirror: axes of s along which a patch is mirrored half of the time.
        gain: largest relative change of each channel's intensity.
        offset: largest shift of each channel's intensity, in the image's unit.
        noise: largest standard deviation of noise, in the image's unit, added to every sixth patch.
        seed: of all of it.

    Raises:
        ValueError: ``size`` has another number of axes than the items.
    """

    def __init__(
        self,
        items: Iterable[Mapping[str, Any]],
        size: Sequence[int],
        *,
        rotate: float = 0.0,
        scale: float = 0.0,
        mirror: Sequence[int] = (),
        gain: float = 0.0,
        offset: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        size = tuple(size)
        axes = len(size)
        pad = SpatialPadd(BOTH, spatial_size=size)
        crop = RandCropByPosNegLabeld(
            BOTH, label_key="label", spatial_size=size, fg_indices_key="labelled", bg_indices_key="background"
        )
        affine = RandAffined(
            BOTH,
            prob=1.0,
            rotate_range=[rotate] * (1 if axes == 2 else axes),
            scale_range=[scale] * axes,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        )
        variants: list[Callable[..., Any]] = [
            crop,
            *([affine] if rotate or scale else []),
            *(RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in mirror),
            RandScaleIntensityd("image", factors=gain, prob=1.0, channel_wise=True),
            RandShiftIntensityd("image", offsets=offset, prob=1.0, channel_wise=True),
            RandGaussianNoised("image", prob=1 / 6, std=noise),
            SelectItemsd(BOTH),
            EnsureTyped(BOTH, track_meta=False),
        ]
        prepared = []
        for item in items:
            if (found := item["image"].ndim - 1) != axes:
                raise ValueError(f"patches of size {size} are of {axes} axes, the items of {found}; change one of them")
            pair = pad({key: item[key] for key in BOTH})
            prepared.append(pair | centres(pair["label"]))
        super().__init__(prepared, variants, seed)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        (patch,) = super().__getitem__(draw)  # MONAI's crop gives a list
        return patch


def centres(label: Tensor) -> dict[str, Tensor]:
    """Flat indices of some labelled and some background voxels, spread evenly; where one kind is absent, of the other.

    MONAI's own indices are of all voxels, and a kind without any makes it warn at every draw.
    """
    flat = torch.as_tensor(label).flatten() > 0
    kinds = {"labelled": flat.nonzero()[:, 0], "background": (~flat).nonzero()[:, 0]}
    present = {kind: index for kind, index in kinds.items() if len(index)}
    whole = next(iter(present.values()))
    return {kind: thinned(present.get(kind, whole)) for kind in kinds}


def thinned(index: Tensor) -> Tensor:
    return index[:: -(-len(index) // KEPT)].clone()
