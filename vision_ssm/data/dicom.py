"""One DICOM series as a volume: slices in the order of their positions, on the grid that the positions span."""
# Shapes: x along the rows of a slice, y down its columns, z from slice to slice.

from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.misc import is_dicom
from pydicom.pixels.processing import apply_modality_lut

__all__ = ["read_series", "series_files"]

UNEVEN = 0.05  # of the step between slices; rounded positions differ by far less, a missing slice by 1
SKEW = 0.01  # from 1, of the length of the normal; rounded directions differ by far less
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts millimetres to the left and back, NIfTI to the right and front
PLACE = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}  # and how many numbers each has
NEEDED = ("PixelData", "Rows", "Columns", "SeriesInstanceUID", *PLACE)
USED = (*NEEDED, "SpacingBetweenSlices", "SliceThickness", "NumberOfFrames", "SamplesPerPixel")
DAMAGED = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    OSError,
    AttributeError,
    ValueError,
    TypeError,
    RuntimeError,
)


def series_files(folder: Path) -> list[Path]:
    """DICOM files directly in a folder; one that is called like the others, or .dcm, counts even if it is damaged."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.name != "DICOMDIR"]
    readable = {path for path in files if is_dicom(path)}
    endings = {".dcm", *map(ending, readable)}
    return [path for path in files if ending(path) in endings]


def ending(path: Path) -> str:
    """A file's suffix; none if it is a number, as of a file called by its UID."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdecimal() else suffix


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z) as float32, rescaled to their unit, and the 4 x 4 affine to millimetres as NIfTI counts them.

    Raises:
        FileNotFoundError: the folder has no DICOM file.
        ValueError: a file is damaged or no single grey slice with a place in space; the files are of several series;
            slices differ in size, direction or spacing, are at one position, or one is missing between others;
            directions are not at right angles, or a spacing is not positive.
    """
    files = series_files(folder)
    if not files:
        raise FileNotFoundError(f"no DICOM file in {folder}; give the folder that holds the files of one series")
    slices = [read_file(path) for path in files]
    require_one_series(folder, slices)
    for item in slices:
        require_slice(item)
    first = slices[0]
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        kinds = {tuple(np.round(np.atleast_1d(item.get(name)).astype(float), 4).tolist()) for item in slices}
        if len(kinds) > 1:
            raise ValueError(f"the slices in {folder} differ in {name}: {sorted(kinds)}; keep those of one image")
    along_row, down_column = np.reshape([float(value) for value in first.ImageOrientationPatient], (2, 3))
    normal = np.cross(along_row, down_column)
    if abs(np.linalg.norm(normal) - 1) > SKEW:
        raise ValueError(
            f"the slices in {folder} have the ImageOrientationPatient {[*first.ImageOrientationPatient]}, which is no "
            "two directions at right angles; export the series again"
        )
    slices.sort(key=lambda item: float(np.dot(position(item), normal)))
    between_rows, between_columns = (float(value) for value in first.PixelSpacing)

    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = down_column * between_rows
    affine[:3, 2] = step(folder, slices, normal)
    affine[:3, 3] = position(slices[0])
    spacing = [between_columns, between_rows, float(np.linalg.norm(affine[:3, 2]))]
    if min(spacing) <= 0:
        raise ValueError(f"{folder} has a spacing of zero or less: {spacing} mm; write the true spacing into its files")
    voxels = np.stack([rescaled(item) for item in slices], axis=-1)
    if bad := int(voxels.size - np.isfinite(voxels).sum()):
        raise ValueError(f"{folder} holds {bad} NaN or infinite voxels of {voxels.size}; replace them before use")
    return voxels, TO_RAS @ affine


def read_file(path: Path) -> pydicom.Dataset:
    try:
        item = pydicom.dcmread(path)
        for name in USED:
            item.get(name)  # which decodes it, so that the error of a damaged one is of this file
        return item
    except DAMAGED as error:
        raise ValueError(f"{path} is truncated or no DICOM file ({error}); export the series again") from error


def require_slice(item: pydicom.Dataset) -> None:
    """Raises ValueError unless a file is one grey slice with a place in space."""
    missing = [name for name in NEEDED if not item.get(name)]
    if missing:
        raise ValueError(
            f"{item.filename} has no {', '.join(missing)}: it is truncated or no slice of a volume; export the series "
            "again, or take the file out"
        )
    for name, count in PLACE.items():
        try:
            numbers = [float(value) for value in item.get(name)]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise ValueError(
                f"{item.filename} has {item.get(name)!r} as its {name}, which is {count} numbers; export the series "
                "again, or take the file out"
            )
    if int(item.get("NumberOfFrames") or 1) > 1 or int(item.get("SamplesPerPixel") or 1) > 1:
        raise ValueError(f"{item.filename} holds several frames or colours; convert it to NIfTI first")


def require_one_series(folder: Path, slices: list[pydicom.Dataset]) -> None:
    """Raises ValueError naming every SeriesInstanceUID if there are several."""
    series = Counter(str(item.SeriesInstanceUID) for item in slices if "SeriesInstanceUID" in item)
    if len(series) > 1:
        listed = ", ".join(f"{uid} ({count} files)" for uid, count in sorted(series.items()))
        raise ValueError(
            f"{folder} holds {len(series)} series, SeriesInstanceUID {listed}; put each into a folder of its own"
        )


def step(folder: Path, slices: list[pydicom.Dataset], normal: np.ndarray) -> np.ndarray:
    """Millimetres from one slice to the next, (3,), out of the positions; a lone slice has its thickness.

    A tilted gantry gives a step that is not along the normal, which the affine keeps.

    Raises:
        ValueError: two slices share a position, or the positions are not evenly spaced.
    """
    if len(slices) == 1:
        return normal * float(slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness") or 0)
    positions = np.stack([position(item) for item in slices])
    distances = np.diff(positions @ normal)
    if not distances.all():
        place = positions[int(np.flatnonzero(distances == 0)[0])].tolist()
        raise ValueError(f"{folder} holds two slices at the position {place} mm; give a series of one volume")
    mean = (positions[-1] - positions[0]) / (len(slices) - 1)
    even = positions[0] + np.arange(len(slices))[:, None] * mean
    if np.abs(positions - even).max() > UNEVEN * np.linalg.norm(mean):
        raise ValueError(
            f"the slices in {folder} are not evenly spaced: {distances.min():g} to {distances.max():g} mm apart; a "
            "slice is missing, or the series needs resampling first"
        )
    return mean


def position(item: pydicom.Dataset) -> np.ndarray:
    """Centre of a slice's first voxel in millimetres: (3,)."""
    return np.array([float(value) for value in item.ImagePositionPatient])


def rescaled(item: pydicom.Dataset) -> np.ndarray:
    """Voxels of a slice (x, y) in the unit of the modality, such as Hounsfield units.

    Raises:
        ValueError: the pixels are incomplete, or compressed in a way that needs another package.
    """
    try:
        pixels = apply_modality_lut(item.pixel_array, item)
    except DAMAGED as error:
        raise ValueError(f"the pixels of {item.filename} cannot be read ({error}); export the series again") from error
    return pixels.astype(np.float32).T
