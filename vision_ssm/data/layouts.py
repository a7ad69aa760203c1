"""Cases of data sets as their publishers lay them out: paths for ``LoadVolumed``, or arrays of slices.

Every function takes the folder of the data set and checks that it holds what the layout says. Data sets that name no
test cases are split by case: of cases in the order of their names, every ``folds``-th, beginning with number ``fold``,
is tested and the others train.
"""
# Shapes: d slices of h x w pixels; x y z the grid of a volume.

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from monai.data import load_decathlon_datalist
from torch import Tensor

from vision_ssm.data.volumes import class_map

__all__ = ["Part", "acdc_cases", "brats_cases", "decathlon_cases", "one_case", "synapse_arrays"]

Part = Literal["train", "test"]
Case = dict[str, Any]

NIFTI = (".nii.gz", ".nii")
BRATS_ENDINGS = {  # up to 2021, and since 2023
    "t1": ("_t1", "-t1n"),
    "t1ce": ("_t1ce", "-t1c"),
    "t2": ("_t2", "-t2w"),
    "flair": ("_flair", "-t2f"),
    "seg": ("_seg", "-seg"),
}


def one_case(root: str, image: str, label: str) -> list[Case]:
    """A single volume and its labels: ``root/image`` and ``root/label``.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    folder = require_folder(root)
    case = {"image": folder / image, "label": folder / label}
    for path in case.values():
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}; it has {listing(folder)}")
    return [{key: str(path) for key, path in case.items()}]


def decathlon_cases(root: str, part: Part, fold: int = 0, folds: int = 5) -> list[Case]:
    """Labelled cases of a Medical Segmentation Decathlon task (http://medicaldecathlon.com).

    Layout: ``dataset.json`` with ``training`` (a list of ``image`` and ``label``), ``labels`` and ``modality``;
    ``imagesTr/`` and ``labelsTr/``. An image of several modalities has them along its fourth axis.

    Raises:
        FileNotFoundError, ValueError: ``dataset.json`` is missing, damaged, or lacks entries.
    """
    description = require_folder(root) / "dataset.json"
    if not description.is_file():
        raise FileNotFoundError(f"{root} has no dataset.json; give the folder of one task, such as Task04_Hippocampus")
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{description} is not JSON ({error}); extract it again") from error
    if missing := [key for key in ("modality", "labels", "training") if not content.get(key)]:
        raise ValueError(f"{description} lacks {', '.join(missing)}; a Decathlon task has modality, labels, training")
    for number, entry in enumerate(content["training"]):
        if not {"image", "label"} <= set(entry):
            raise ValueError(f"{description}: entry {number} of training is {entry}; it needs image and label")
    cases = load_decathlon_datalist(description, data_list_key="training")
    pairs = [{key: case[key] for key in ("image", "label")} for case in cases]
    return split(sorted(pairs, key=lambda case: case["image"]), part, fold, folds)


def brats_cases(root: str, part: Part, fold: int = 0, folds: int = 5) -> list[Case]:
    """Labelled cases of BraTS: a folder for each, with T1, contrast-enhanced T1, T2, FLAIR and labels.

    Layout: ``CASE/CASE_t1.nii.gz``, ``_t1ce``, ``_t2``, ``_flair``, ``_seg`` up to 2021; ``-t1n``, ``-t1c``, ``-t2w``,
    ``-t2f``, ``-seg`` since 2023. The image is the list of the four files, in the order of the first sentence.

    Raises:
        FileNotFoundError: there are no case folders, or one lacks a file.
        ValueError: a folder has two files of one kind.
    """
    folders = case_folders(root, "*")
    cases = []
    for folder in folders:
        files = {kind: brats_file(folder, kind) for kind in BRATS_ENDINGS}
        cases.append({"image": [files[kind] for kind in ("t1", "t1ce", "t2", "flair")], "label": files["seg"]})
    return split(cases, part, fold, folds)


def brats_file(folder: Path, kind: str) -> str:
    endings = [ending + suffix for ending in BRATS_ENDINGS[kind] for suffix in NIFTI]
    found = sorted(str(path) for path in folder.iterdir() if path.name.lower().endswith(tuple(endings)))
    if not found:
        raise FileNotFoundError(f"{folder} has no file that ends in {' or '.join(endings)}; it has {listing(folder)}")
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} files of {kind}: {', '.join(found)}; leave one")
    return found[0]


def acdc_cases(root: str, part: Part, fold: int = 0, folds: int = 5) -> list[Case]:
    """Labelled frames of ACDC's cardiac cines, split by patient: both frames of one are in the same part.

    Layout: ``patientXXX/patientXXX_frameYY.nii.gz`` and ``_frameYY_gt.nii.gz``, beside the cine
    ``patientXXX_4d.nii.gz``, which has no labels and is not read.

    Raises:
        FileNotFoundError: there are no patient folders, or one has no labelled frame, or a label has no frame.
    """
    patients = []
    for folder in case_folders(root, "patient*"):
        labels = sorted(path for suffix in NIFTI for path in folder.glob(f"*_frame*_gt{suffix}"))
        if not labels:
            raise FileNotFoundError(f"{folder} has no labelled frame *_frameXX_gt.nii.gz; it has {listing(folder)}")
        frames = [label.with_name(label.name.replace("_gt.nii", ".nii")) for label in labels]
        if absent := [str(frame) for frame in frames if not frame.is_file()]:
            raise FileNotFoundError(f"labels without their frame: {', '.join(absent)} missing")
        patients.append([{"image": str(f), "label": str(g)} for f, g in zip(frames, labels, strict=True)])
    return [frame for patient in split(patients, part, fold, folds) for frame in patient]


def synapse_arrays(root: str, part: Part, classes: int) -> list[dict[str, Tensor]]:
    """The slices and volumes of the Synapse abdomen set as TransUNet's authors prepared it.

    Layout: ``train_npz/CASE_sliceXXX.npz`` and ``test_vol_h5/CASE.npy.h5`` (or .npz), each with ``image`` and
    ``label``. Reading .h5 needs h5py. The files say nothing of spacing or orientation.

    Returns:
        Slices (1, h, w) to train; volumes (d, h, w) as (1, h, w, d) to test.

    Raises:
        FileNotFoundError, ValueError: the folder has no such files; one is damaged, lacks an array, holds arrays of
            another or different shapes, NaN or infinite voxels, or labels outside 0 to classes - 1.
        ImportError: there are .h5 files and no h5py.
    """
    name, axes = {"train": ("train_npz", 2), "test": ("test_vol_h5", 3)}[require_part(part)]
    folder = require_folder(root) / name
    paths = sorted(path for pattern in ("*.npz", "*.h5") for path in folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder} has no .npz or .h5 file; the folder to give is the one above {name}")
    return [checked_arrays(path, axes, classes) for path in paths]


def checked_arrays(path: Path, axes: int, classes: int) -> dict[str, Tensor]:
    arrays = read_arrays(path)
    if absent := [key for key in ("image", "label") if key not in arrays]:
        raise ValueError(f"{path} has no array {' and '.join(absent)}; it has {', '.join(arrays) or 'none'}")
    image, label = arrays["image"].astype(np.float32), arrays["label"]
    if image.shape != label.shape or image.ndim != axes:
        raise ValueError(f"{path} has image {image.shape} and label {label.shape}; both need {axes} axes of one shape")
    if bad := int(image.size - np.isfinite(image).sum()):
        raise ValueError(f"{path} holds {bad} NaN or infinite voxels of {image.size}; replace them before use")
    pair = {"image": image, "label": class_map(label, [(value,) for value in range(classes)], path)}
    return {key: torch.from_numpy(np.moveaxis(a, 0, -1) if axes == 3 else a)[None] for key, a in pair.items()}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        import h5py

        with h5py.File(path) as file:
            return {key: np.asarray(file[key]) for key in file}
    except ImportError as error:
        raise ImportError(f"{path} needs h5py to be read; pip install h5py, or convert it to .npz") from error
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from error


def split(cases: Sequence[Any], part: Part, fold: int, folds: int) -> list[Any]:
    """The cases of one part; see the module's first lines.

    Raises:
        ValueError: there is no such part or fold, or it would be empty.
    """
    if not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds} does not exist; folds are 0 to {folds - 1}")
    tested = require_part(part) == "test"
    chosen = [case for number, case in enumerate(cases) if (number % folds == fold) == tested]
    if not chosen:
        raise ValueError(f"{len(cases)} cases give none to {part} in fold {fold} of {folds}; choose fewer folds")
    return chosen


def require_part(part: Part) -> Part:
    if part not in ("train", "test"):
        raise ValueError(f"unknown part {part!r}; parts are train and test")
    return part


def case_folders(root: str, pattern: str) -> list[Path]:
    folder = require_folder(root)
    found = sorted(path for path in folder.glob(pattern) if path.is_dir() and re.match(r"[^._]", path.name))
    if not found:
        raise FileNotFoundError(f"{folder} has no case folders {pattern}; it has {listing(folder)}")
    return found


def require_folder(root: str) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; say where the data are with --set data_root=FOLDER")
    return folder


def listing(folder: Path) -> str:
    """Some names of what a folder holds."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
