"""Small data sets in their publishers' layouts, made of every fourth voxel of the embedded brain."""

import json
from pathlib import Path

import nibabel
import numpy as np

from vision_ssm.data.deep_grey import deep_grey_files

CASES = 3


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def small_brain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and labels (24, 24, 16), and an affine of 1 mm, for which no config resamples them to more voxels."""
    image, label = (nibabel.load(deep_grey_files()[0][key]) for key in ("image", "label"))
    voxels = [np.asarray(one.dataobj)[::4, ::4, ::4] for one in (image, label)]
    return voxels[0].astype(np.float32), voxels[1], image.affine


def decathlon(root: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    training = []
    for number in range(CASES):
        pair = {"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"}
        save(root / pair["image"], image + number, affine)
        save(root / pair["label"], np.minimum(label, 2), affine)
        training.append(pair)
    labels = {"0": "background", "1": "anterior", "2": "posterior"}
    description = {"modality": {"0": "MRI"}, "labels": labels, "training": training, "test": []}
    (root / "dataset.json").write_text(json.dumps(description))


def brats(root: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    endings = {False: ("_t1", "_t1ce", "_t2", "_flair", "_seg"), True: ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")}
    for number in range(CASES):
        new = number == 1  # one case in the layout of 2023, in which the last label is 3
        name = f"BraTS-GLI-0000{number}-000" if new else f"BraTS2021_0000{number}"
        values = np.array([0, 1, 2, 3 if new else 4, 0, 0, 0], dtype=np.uint8)
        for scale, ending in enumerate(endings[new][:4], start=1):
            save(root / name / f"{name}{ending}.nii.gz", image * scale, affine)
        save(root / name / f"{name}{endings[new][4]}.nii.gz", values[label], affine)


def acdc(root: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    for number in range(1, CASES + 1):
        patient = root / f"patient{number:03}" / f"patient{number:03}"
        save(patient.with_name(f"{patient.name}_4d.nii.gz"), np.stack([image + number] * 12, axis=-1), affine)
        for frame in ("frame01", "frame12"):
            save(patient.with_name(f"{patient.name}_{frame}.nii.gz"), image + number, affine)
            save(patient.with_name(f"{patient.name}_{frame}_gt.nii.gz"), np.minimum(label, 3), affine)


def synapse(root: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    slices, volumes = root / "train_npz", root / "test_vol_h5"
    for folder in (slices, volumes):
        folder.mkdir(parents=True)
    image = image / image.max()
    for z in range(0, image.shape[-1], 4):
        np.savez(slices / f"case0001_slice{z:03}.npz", image=image[..., z], label=label[..., z].astype(np.float32))
    np.savez(volumes / "case0002.npz", image=np.moveaxis(image, -1, 0), label=np.moveaxis(label, -1, 0))


LAYOUTS = {layout.__name__: layout for layout in (decathlon, brats, acdc, synapse)}
