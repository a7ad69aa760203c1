"""Cine volumes, NIfTI of x, y, z and time, as video: every slice is a clip."""
# Shapes: x y z the grid of a volume, t its frames in time; h w of a clip are x and y.

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vision_ssm.data.layouts import NIFTI, Part, case_folders, listing, require_folder, split
from vision_ssm.data.video_folder import tracked
from vision_ssm.data.volumes import check_grid, class_map, open_volume, read_volume, voxels_of

__all__ = [
    "UNLABELLED",
    "CineSlices",
    "acdc_cines",
    "check_labelled",
    "nifti_cines",
    "open_cine",
    "read_cine",
    "read_labels",
]

UNLABELLED = -1
PERCENTILES = (1, 99)  # of a cine's intensities, which become -1 and 1


class CineSlices(Dataset[dict[str, Tensor]]):
    """The slices of cine volumes as clips, case by case.

    Intensities are scaled once for a whole cine, so that slices and frames keep their contrast. A cine is one beat of
    the heart: of more frames than ``frames``, evenly spaced ones are taken, with those that have labels among them.

    Args:
        cases: each with ``video``, the path of a 4-D NIfTI, and ``labels``, paths of 3-D label maps by the number of
            their frame, counted from 0; see ``acdc_cines``.
        frames: length t of a clip.
        size: pixels along x and y; slices are cropped or padded, alike on both sides.
        spacing: millimetres between pixels to which slices are resampled; by default they keep their own.
        classes: of the labels, as in ``LoadVolumed``; without, labels are not read.

    Items: ``video`` (t, 1, h, w) float32 in [-1, 1]; ``spacing`` (2,) float64, millimetres along h and w; with
    ``classes``, ``label`` (t, 1, h, w) int64, ``UNLABELLED`` in all frames without labels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable (see ``read_volume``); a cine has not four dimensions, has fewer than
            ``frames`` frames, no contrast, or no labels; more frames have labels than ``frames``; labels lie on another
            grid, are of a frame that does not exist, or are no class; a number is out of range.
    """

    def __init__(
        self,
        cases: Iterable[Mapping[str, Any]],
        *,
        frames: int,
        size: tuple[int, int],
        spacing: float | None = None,
        classes: int | Sequence[Sequence[int]] | None = None,
    ) -> None:
        if min(frames, *size) < 1 or (spacing is not None and spacing <= 0):
            raise ValueError(
                "frames and size must be at least 1, and spacing above 0; "
                f"got frames={frames}, size={tuple(size)}, spacing={spacing}"
            )
        self.frames, self.size, self.spacing = frames, (size[0], size[1]), spacing
        self.values = [(value,) for value in range(classes)] if isinstance(classes, int) else classes
        self.clips = [clip for case in tracked(list(cases), "reading cines") for clip in self.slices(case)]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value.long() if key == "label" else value for key, value in self.clips[index].items()}

    def slices(self, case: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """The clips of one case."""
        path, sources = Path(case["video"]), {} if self.values is None else case["labels"]
        voxels, affine = read_cine(path)
        chosen = self.chosen(path, voxels.shape[-1], sorted(sources))
        video, spacing = self.fitted(voxels[..., chosen], affine, "bilinear", fill=-1)
        cine = {"video": video, "spacing": spacing.expand(len(video), -1)}
        if self.values is not None:
            maps = [read_labels(source, self.values, path, (voxels[..., 0], affine)) for source in sources.values()]
            label, _ = self.fitted(np.stack(maps, axis=-1), affine, "nearest-exact", fill=0)
            cine["label"] = torch.full(video.shape, UNLABELLED, dtype=torch.int8)
            cine["label"][:, [chosen.index(frame) for frame in sources]] = label.to(torch.int8)
        return [dict(zip(cine, parts, strict=True)) for parts in zip(*cine.values(), strict=True)]

    def chosen(self, path: Path, total: int, labelled: Sequence[int]) -> list[int]:
        """Numbers of the frames that a cine of ``total`` gives, or the ValueError that says why it cannot."""
        if self.frames > total:
            raise ValueError(f"{path} has {total} frames, a clip {self.frames}; take fewer, or leave this cine out")
        if self.values is not None and not labelled:
            raise ValueError(f"{path} comes without labels; leave out classes, or the cine")
        if len(labelled) > self.frames:
            raise ValueError(f"{path} has labels of {len(labelled)} frames, a clip {self.frames} frames; take more")
        check_labelled(path, total, labelled)
        return evenly(total, self.frames, labelled)

    def fitted(self, voxels: np.ndarray, affine: np.ndarray, mode: str, fill: int) -> tuple[Tensor, Tensor]:
        """(x, y, z, t) -> (z, t, 1, h, w) of the right spacing and size, and the spacing of h and w (2,)."""
        clips, spacing = self.resampled(voxels, affine, mode)
        (more_h, more_w) = (want - have for want, have in zip(self.size, clips.shape[-2:], strict=True))
        around = (more_w // 2, more_w - more_w // 2, more_h // 2, more_h - more_h // 2)  # what is negative is cut off
        return F.pad(clips, around, value=fill)[:, :, None], spacing

    def resampled(self, voxels: np.ndarray, affine: np.ndarray, mode: str) -> tuple[Tensor, Tensor]:
        """(x, y, z, t) -> (z, t, h, w) of the right spacing, float32, and the spacing of h and w (2,)."""
        clips = torch.from_numpy(np.ascontiguousarray(voxels.transpose(2, 3, 0, 1), np.float32))
        spacing = torch.from_numpy(np.linalg.norm(affine[:3, :2], axis=0))
        if self.spacing is not None:
            before = torch.tensor(clips.shape[-2:])
            after = (before * spacing / self.spacing).round().clamp(min=1).long()
            clips = F.interpolate(clips, size=tuple(after.tolist()), mode=mode, antialias=mode == "bilinear")
            spacing = spacing * before / after
        return clips, spacing


def acdc_cines(root: str, part: Part, fold: int = 0, folds: int = 5) -> list[dict[str, Any]]:
    """Cines of ACDC with the labels of their end-diastolic and end-systolic frames, split by patient.

    Layout: ``patientXXX/patientXXX_4d.nii.gz`` and ``patientXXX_frameYY_gt.nii.gz``, where frame 01 is the first.

    Raises:
        FileNotFoundError: there are no patient folders, or one has no cine, or no labelled frame.
        ValueError: there is no such part or fold, or it would be empty.
    """
    cases = []
    for folder in case_folders(root, "patient*"):
        found = sorted(path for suffix in NIFTI for path in folder.glob(f"*_4d{suffix}"))
        frames = {
            int(number[1]) - 1: str(path)
            for path in sorted(folder.iterdir())
            if (number := re.search(r"_frame(\d+)_gt\.nii(\.gz)?$", path.name))
        }
        if len(found) != 1 or not frames:
            raise FileNotFoundError(
                f"{folder} needs one cine *_4d.nii.gz and labelled frames *_frameXX_gt.nii.gz; it has {listing(folder)}"
            )
        cases.append({"video": str(found[0]), "labels": frames})
    return split(cases, part, fold, folds)


def nifti_cines(root: str, part: Part, fold: int = 0, folds: int = 5) -> list[dict[str, Any]]:
    """The NIfTI files of a folder and of those in it, as cines without labels, split by file.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there is no such part or fold, or it would be empty.
    """
    folder = require_folder(root)
    paths = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(NIFTI))
    if not paths:
        raise FileNotFoundError(f"{folder} has no .nii or .nii.gz file; it has {listing(folder)}")
    return split([{"video": str(path), "labels": {}} for path in paths], part, fold, folds)


def open_cine(path: Path) -> Any:
    """A cine whose voxels (x, y, z, t) are not read yet; errors as ``CineSlices``."""
    image = open_volume(path)
    if len(image.shape) != 4:
        raise ValueError(f"{path} has {len(image.shape)} dimensions {image.shape}; a cine has 4, the last of them time")
    return image


def read_cine(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z, t) from -1 to 1, float32, and the affine; errors as ``CineSlices``."""
    image = open_cine(path)
    voxels = voxels_of(image, path)
    low, high = np.percentile(voxels, PERCENTILES)
    if low >= high:
        raise ValueError(f"{path} has no contrast: most of its voxels are {low:g}; leave it out")
    return np.clip((voxels - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32), image.affine


def check_labelled(path: Path, total: int, labelled: Sequence[int]) -> None:
    """Raises ValueError unless a cine of ``total`` frames has those that have labels."""
    if beyond := [number + 1 for number in labelled if not 0 <= number < total]:
        raise ValueError(f"{path} has {total} frames, and there are labels of frame {beyond[0]}; remove them")


def read_labels(
    source: str, values: Sequence[Sequence[int]], path: Path, frame: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Classes (x, y, z) of one frame, which is given with its affine."""
    label, affine = read_volume(source)
    check_grid(f"cine {path} and label {source}", frame, (label, affine))
    return class_map(label, values, source)


def evenly(total: int, frames: int, required: Sequence[int]) -> list[int]:
    """Numbers of ``frames`` of ``total`` frames, evenly spaced; those required take the place of the nearest."""
    chosen = {number * total // frames for number in range(frames)}
    for number in required:
        if number not in chosen:
            chosen.remove(min(chosen.difference(required), key=lambda other: (abs(other - number), other)))
            chosen.add(number)
    return sorted(chosen)
