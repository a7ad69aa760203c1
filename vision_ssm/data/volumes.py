"""NIfTI volumes as MONAI dictionaries, checked while loading so that bad data stops before training starts."""
# Shapes: c channels, x y z the grid of a volume in the file's order.

import gzip
import math
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from torch.utils.data import Dataset

__all__ = [
    "AxialSlices",
    "LoadVolumed",
    "NeighbourSlicesd",
    "PreparedVolumes",
    "prepared",
    "read_channels",
    "read_volume",
]

AFFINE_TOLERANCE = 1e-3  # mm; what float32 headers of the same grid differ by is far smaller
WHOLE = 1e-3  # from a whole number, of a label; what integers that a header scales are rounded to
FLAT = 1e-3  # volume that the unit vectors along the three axes span, at least; of right angles it is 1
OTHER_UNITS = {1: "metres", 3: "micrometres"}  # by their code in a header; files in millimetres often leave it 0


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z) as float32 and the 4 x 4 affine to millimetres; further axes of one place are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no NIfTI, is truncated or damaged, is not three-dimensional, has an axis without spacing
            or one not in millimetres, or holds no voxels, colours, complex numbers, NaN or infinite voxels.
    """
    image = open_volume(Path(path))
    if len(image.shape) < 3 or any(size > 1 for size in image.shape[3:]):
        raise ValueError(f"{path} has {len(image.shape)} dimensions {image.shape}; a volume has 3. Save one channel")
    return voxels_of(image, path).reshape(image.shape[:3]), image.affine


def read_channels(source: str | Path | Sequence[str | Path], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (c, x, y, z) as float32 and the affine of an image of several channels.

    Args:
        source: a file for each channel, or one file whose fourth axis is the channels; one of three axes is a channel.

    Raises:
        FileNotFoundError, ValueError: a file is unreadable (see ``read_volume``), the number of channels is another,
            or the files lie on different grids.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        image = open_volume(path)
        if channels == 1 or len(image.shape) not in (3, 4):
            return read_volume(path)[0][None], image.affine
        found = image.shape[3] if len(image.shape) == 4 else 1
        require_channels(path, found, channels)
        return np.ascontiguousarray(np.moveaxis(voxels_of(image, path), -1, 0)), image.affine
    require_channels(" ".join(map(str, source)), len(source), channels)
    loaded = [(path, *read_volume(path)) for path in source]
    first, voxels, affine = loaded[0]
    for other, other_voxels, other_affine in loaded[1:]:
        check_grid(f"channels {first} and {other}", (voxels, affine), (other_voxels, other_affine))
    return np.stack([voxels for _, voxels, _ in loaded]), affine


def open_volume(path: Path) -> Any:
    """A NIfTI image whose voxels are not read yet; errors as for ``read_volume``."""
    if not path.is_file():
        raise FileNotFoundError(f"no such volume: {path}. Give the path of a .nii or .nii.gz file")
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a readable NIfTI file ({error}); give a whole .nii or .nii.gz file"
        ) from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"{path} is a {type(image).__name__}, not a NIfTI file; convert it to .nii.gz first")
    if min(image.shape, default=0) < 1:
        raise ValueError(f"{path} has no voxels: its sizes are {image.shape}; copy or convert it again")
    if (kind := np.dtype(image.get_data_dtype())).kind not in "iuf":
        raise ValueError(f"{path} holds voxels of {kind}; a volume has one real number in each. Save one grey channel")
    if unit := OTHER_UNITS.get(int(image.header["xyzt_units"]) % 8):
        raise ValueError(f"{path} is in {unit}; write its spacing in millimetres, and that unit, into its header")
    written, spacing = written_spacing(image), np.linalg.norm(image.affine[:3, :3], axis=0).tolist()
    if not all(math.isfinite(step) and step > 0 for step in (*written, *spacing)):
        raise ValueError(
            f"{path} has a spacing of zero: pixdim {written} mm, affine {spacing} mm; write the true spacing into its "
            "header"
        )
    if abs(np.linalg.det(image.affine[:3, :3] / spacing)) < FLAT:
        raise ValueError(
            f"{path} has its three axes in one plane: affine {image.affine.tolist()}; write the true directions into "
            "its header"
        )
    return image


def written_spacing(image: Any) -> tuple[float, ...]:
    """Spacing of x, y and z as it stands in the file: nibabel turns zeros into ones while loading."""
    with image.file_map.get("header", image.file_map["image"]).get_prepare_fileobj("rb") as file:
        header = type(image.header).from_fileobj(file, check=False)
    return tuple(abs(float(step)) for step in header["pixdim"][1 : 1 + min(3, len(image.shape))])


def voxels_of(image: Any, path: str | Path) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # of float64, which are infinite then and counted below
            voxels: np.ndarray = image.get_fdata(dtype=np.float32, caching="unchanged")
        if Path(path).suffix == ".gz":
            read_checksum(Path(path))
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from error
    if bad := int(voxels.size - np.isfinite(voxels).sum()):
        raise ValueError(f"{path} holds {bad} NaN or infinite voxels of {voxels.size}; replace them before use")
    return voxels


def read_checksum(path: Path) -> None:
    """Reads a gzip file to its end, where its checksum is; nibabel stops at the last voxel. OSError if it is wrong."""
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


def require_channels(source: object, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{source} has {found} channels where {expected} are expected; give a file for each, or one file with "
            f"{expected} along its fourth axis"
        )


class LoadVolumed(MapTransform):
    """Paths under ``image`` and, if present, ``label`` -> tensors (c, x, y, z) and (1, x, y, z) with their affine.

    Args:
        classes: number of classes, the labels being 0 to classes - 1; or the values that stand for each class in a
            file, background first, such as ((0,), (1,), (2,), (3, 4)).
        channels: of the image; see ``read_channels`` for how several are stored.

    Raises:
        FileNotFoundError, ValueError: a file is unreadable (see ``read_volume``), image and label lie on different
            grids, the image has other channels, or a label is no class.

    Warns:
        UserWarning: a label map holds background alone, which is allowed.
    """

    def __init__(self, classes: int | Sequence[Sequence[int]], channels: int = 1) -> None:
        super().__init__(keys=("image", "label"), allow_missing_keys=True)
        self.values = [(value,) for value in range(classes)] if isinstance(classes, int) else [*map(tuple, classes)]
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        paths = {key: data[key] for key in self.key_iterator(dict(data))}
        loaded = {"image": read_channels(paths["image"], self.channels)}
        if "label" in paths:
            label, affine = read_volume(paths["label"])
            check_grid(f"image {paths['image']} and label {paths['label']}", loaded["image"], (label, affine))
            classes = class_map(label, self.values, paths["label"])
            if not classes.any():
                warnings.warn(f"{paths['label']} holds background alone; its patches are drawn anywhere", stacklevel=2)
            loaded["label"] = (classes[None], affine)
        files = {key: path if isinstance(path, (str, Path)) else path[0] for key, path in paths.items()}
        return dict(data) | {
            key: MetaTensor(
                torch.from_numpy(voxels), affine=torch.from_numpy(affine), meta={"filename_or_obj": str(files[key])}
            )
            for key, (voxels, affine) in loaded.items()
        }


def check_grid(pair: str, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> None:
    """Raises ValueError unless two volumes, voxels and affine, have one shape and one affine."""
    (voxels, affine), (other, other_affine) = first, second
    if voxels.shape[-3:] != other.shape[-3:]:
        raise ValueError(
            f"{pair} differ in shape: {voxels.shape[-3:]} and {other.shape[-3:]}; resample one onto the other"
        )
    if not np.allclose(affine, other_affine, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"{pair} lie on different grids: affines {affine.tolist()} and {other_affine.tolist()}; "
            "resample one onto the other"
        )


def class_map(label: np.ndarray, values: Sequence[Sequence[int]], path: object) -> np.ndarray:
    """Values of a file -> classes 0, 1, ... as float32; ``values[i]`` are those of class i.

    Raises:
        ValueError: a value belongs to no class.
    """
    numbers = {value: number for number, members in enumerate(values) for value in members}
    table = np.full(max(numbers) + 1, -1, dtype=np.float32)
    table[list(numbers)] = list(numbers.values())
    index = np.rint(label).astype(np.int64)
    whole = (np.abs(index - label) < WHOLE) & (index >= 0) & (index < len(table))
    classes = np.where(whole, table[np.where(whole, index, 0)], np.float32(-1))
    if (classes < 0).any():
        plain = sorted(numbers) == list(range(len(values)))
        known = f"0 to {len(values) - 1}" if plain else ", ".join(map(str, sorted(numbers)))
        wrong = ", ".join(f"{value:g}" for value in np.unique(label[classes < 0])[:10])
        raise ValueError(f"{path} holds labels outside the classes {known}: {wrong}; remap them or add classes")
    return classes


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


class PreparedVolumes(Dataset[dict[Hashable, Any]]):
    """Volumes that are prepared once, at the start, and held in memory.

    MONAI's CacheDataset prepares in a thread. When it reports an error it is at the next volume already, and a process
    that ends meanwhile is aborted.

    Args:
        data: paths under ``image`` and ``label``.
        transform: MONAI's dictionary transforms without random ones, or several in turn.

    Raises:
        FileNotFoundError, ValueError: the error of the first transform that failed.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]],
        transform: Callable[..., Any] | Sequence[Callable[..., Any]],
    ) -> None:
        self.data = data
        prepare = transform if callable(transform) else Compose(transform)
        self.volumes = [prepared(prepare, case) for case in data]

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, position: int) -> dict[Hashable, Any]:
        return dict(self.volumes[position])


def prepared(prepare: Callable[..., Any], paths: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """The item that MONAI's transforms make of paths; an error is that of the one that failed, not MONAI's about it."""
    try:
        item: dict[Hashable, Any] = prepare(dict(paths))
    except RuntimeError as error:
        raise error.__cause__ or error from None
    return item


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
