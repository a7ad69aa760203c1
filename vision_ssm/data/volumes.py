"""NIfTI volumes as MONAI dictionaries, checked while loading so that bad data stops before training starts."""
# Shapes: c channels, x y z the grid of a volume in the file's order.

import zlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from torch.utils.data import Dataset

__all__ = ["AxialSlices", "LoadVolumed", "NeighbourSlicesd", "read_volume"]

AFFINE_TOLERANCE = 1e-3  # mm; what float32 headers of the same grid differ by is far smaller


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z) as float32 and the 4 x 4 affine to millimetres.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no NIfTI, is truncated, is not three-dimensional, or holds NaN or infinite voxels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such volume: {path}. Give the path of a .nii or .nii.gz file")
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is not a readable NIfTI file ({error}); give a .nii or .nii.gz file") from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"{path} is a {type(image).__name__}, not a NIfTI file; convert it to .nii.gz first")
    if len(image.shape) != 3:
        raise ValueError(f"{path} has {len(image.shape)} dimensions {image.shape}; a volume has 3. Save one channel")
    try:
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from error
    if bad := int(voxels.size - np.isfinite(voxels).sum()):
        raise ValueError(f"{path} holds {bad} NaN or infinite voxels of {voxels.size}; replace them before use")
    return voxels, image.affine


class LoadVolumed(MapTransform):
    """Paths under ``image`` and, if present, ``label`` -> tensors (1, x, y, z) that know their affine.

    Args:
        classes: number of classes; labels are 0 to classes - 1.

    Raises:
        FileNotFoundError, ValueError: a file is unreadable (see ``read_volume``), image and label lie on different
            grids, or a label is no class.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(keys=("image", "label"), allow_missing_keys=True)
        self.classes = classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        paths = {key: data[key] for key in self.key_iterator(dict(data))}
        loaded = {key: read_volume(path) for key, path in paths.items()}
        if "label" in loaded:
            check_grid(paths, loaded)
            check_labels(paths["label"], loaded["label"][0], self.classes)
        return dict(data) | {
            key: MetaTensor(
                torch.from_numpy(voxels)[None],
                affine=torch.from_numpy(affine),
                meta={"filename_or_obj": str(paths[key])},
            )
            for key, (voxels, affine) in loaded.items()
        }


def check_grid(paths: Mapping[str, Any], loaded: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Raises ValueError unless image and label have one shape and one affine."""
    (image, image_affine), (label, label_affine) = loaded["image"], loaded["label"]
    pair = f"image {paths['image']} and label {paths['label']}"
    if image.shape != label.shape:
        raise ValueError(f"{pair} differ in shape: {image.shape} and {label.shape}; resample one onto the other")
    if not np.allclose(image_affine, label_affine, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"{pair} lie on different grids: affines {image_affine.tolist()} and {label_affine.tolist()}; "
            "resample one onto the other"
        )


def check_labels(path: Any, label: np.ndarray, classes: int) -> None:
    """Raises ValueError unless every voxel is one of 0 ... classes - 1."""
    values = np.unique(label)
    wrong = [float(value) for value in values if value not in range(classes)]
    if wrong:
        listed = ", ".join(f"{value:g}" for value in wrong[:10])
        raise ValueError(
            f"{path} holds labels outside the classes 0 to {classes - 1}: {listed}; remap them or add classes"
        )


class NeighbourSlicesd(MapTransform):
    """2.5-D input: the ``neighbours`` slices on each side of every axial slice become channels.

    The first and last slice are repeated at the ends. (c, x, y, z) -> (c * (2 * neighbours + 1), x, y, z), so that any
    slice [..., z] is the input of a 2-D network, both for a random slice and for MONAI's ``SliceInferer``.
    """

    def __init__(self, keys: str | tuple[str, ...], neighbours: int) -> None:
        super().__init__(keys)
        self.neighbours = neighbours

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = data[key]
            positions = torch.arange(volume.shape[-1])
            offsets = range(-self.neighbours, self.neighbours + 1)
            shifted = [volume[..., (positions + offset).clamp(0, len(positions) - 1)] for offset in offsets]
            data[key] = torch.cat(shifted, dim=0)
        return data


class AxialSlices(Dataset[dict[str, torch.Tensor]]):
    """The axial slices of prepared volumes, in the volumes' order: (c, x, y, z) -> z items (c, x, y).

    Args:
        volumes: items with tensors of one grid under ``image`` and ``label``.
    """

    def __init__(self, volumes: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self.slices = [
            {key: torch.as_tensor(volume[key])[..., z].contiguous() for key in ("image", "label")}
            for volume in volumes
            for z in range(volume["image"].shape[-1])
        ]

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.slices[position]
