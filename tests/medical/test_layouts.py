"""Data sets as they are published: read whole, split by case, and refused with one clear error where they are bad."""

import json
import re
import shutil
import sys
import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from vision_ssm.data.layouts import acdc_cases, brats_cases, decathlon_cases, one_case, synapse_arrays
from vision_ssm.data.volumes import LoadVolumed, read_volume
from vision_ssm.engine.config import load_config
from vision_ssm.engine.segmentation.cases import find_cases
from vision_ssm.tools.__main__ import main

SHARED = Path(__file__).parents[3] / "shared" / "data"
READERS = {
    "decathlon": (decathlon_cases, LoadVolumed(classes=3)),
    "brats": (brats_cases, LoadVolumed(classes=((0,), (1,), (2,), (3, 4)), channels=4)),
    "acdc": (acdc_cases, LoadVolumed(classes=4)),
}
SAMPLES = {
    "brain_aal_2mm": ("colin27_t1_2mm.nii.gz", "colin27_aal116_2mm.nii.gz", 117),
    "ct_abdomen_3mm": ("ct.nii.gz", "labels7.nii.gz", 8),
    "mr_3mm": ("mr.nii.gz", "labels_total_mr.nii.gz", 51),
    "mni152_tissue_2mm": ("t1.nii.gz", "tissue3.nii.gz", 4),
}


@pytest.fixture
def copied(small_set, tmp_path):
    """A copy of a small data set, to be damaged."""
    return lambda layout: Path(shutil.copytree(small_set(layout), tmp_path / layout))


def rewrite(path: Path, voxels: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, nibabel.load(path).affine), path)


@pytest.mark.parametrize("layout", READERS)
def test_cases_are_split_and_load(small_set, layout):
    cases, load = READERS[layout]
    train, test = (cases(str(small_set(layout)), part, folds=3) for part in ("train", "test"))
    assert len(train) == 2 * len(test)
    assert not {str(case["image"]) for case in train} & {str(case["image"]) for case in test}
    for case in (*train, *test):
        item = load(case)
        assert item["image"].shape == (4 if layout == "brats" else 1, 24, 24, 16)
        assert item["label"].unique().tolist() == list(range(len(load.values)))


def test_folds_test_every_case_once(small_set):
    tested = [decathlon_cases(str(small_set("decathlon")), "test", fold, folds=3)[0]["image"] for fold in range(3)]
    assert len(set(tested)) == 3


def test_modalities_come_in_one_order_whatever_their_names(small_set):
    images = [case["image"] for case in brats_cases(str(small_set("brats")), "train", fold=2, folds=3)]
    endings = [[name.removesuffix(".nii.gz").replace("-", "_").rsplit("_", 1)[1] for name in image] for image in images]
    assert endings == [["t1n", "t1c", "t2w", "t2f"], ["t1", "t1ce", "t2", "flair"]]


def test_a_folder_to_train_on_is_one_to_label_too(small_set):
    root = small_set("brats")
    trained = {
        str(image)
        for part in ("train", "test")
        for case in brats_cases(str(root), part, folds=3)
        for image in case["image"]
    }
    modalities = load_config("medical/brats_umamba").modalities
    cases = find_cases(root, modalities)
    assert {str(path) for case in cases for path in case.images()} == trained
    assert [case.images() for folder in sorted(root.iterdir()) for case in find_cases(folder, modalities)] == [
        case.images() for case in cases
    ]


def test_frames_of_a_patient_stay_together_and_the_cine_is_not_read(small_set):
    train, test = (acdc_cases(str(small_set("acdc")), part, folds=3) for part in ("train", "test"))
    patients = [{Path(case["image"]).parent.name for case in part} for part in (train, test)]
    assert not patients[0] & patients[1]
    assert len(test) == 2
    assert not [case for case in (*train, *test) if "_4d" in case["image"]]


def test_slices_train_and_volumes_are_tested(small_set, small_brain):
    root = str(small_set("synapse"))
    train, test = (synapse_arrays(root, part, classes=9) for part in ("train", "test"))
    assert [item["image"].shape for item in train] == [(1, 24, 24)] * 4
    assert test[0]["label"].shape == (1, 24, 24, 16)
    assert torch.equal(test[0]["label"][0, ..., 8], torch.from_numpy(small_brain[1][..., 8]).float())
    assert torch.equal(train[2]["image"], test[0]["image"][..., 8])


def test_h5_volumes_are_read_as_npz_are(copied):
    h5py = pytest.importorskip("h5py")
    root = copied("synapse")
    volume = root / "test_vol_h5" / "case0002.npz"
    (expected,) = synapse_arrays(str(root), "test", classes=9)
    with h5py.File(volume.with_suffix(".npy.h5"), "w") as file, np.load(volume) as arrays:
        for key in arrays.files:
            file[key] = arrays[key]
    volume.unlink()
    (found,) = synapse_arrays(str(root), "test", classes=9)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_h5_without_h5py_says_what_to_install(copied, monkeypatch):
    root = copied("synapse")
    (root / "test_vol_h5" / "case0003.npy.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"case0003\.npy\.h5 needs h5py .*pip install h5py"):
        synapse_arrays(str(root), "test", classes=9)


@pytest.mark.parametrize("name", SAMPLES)
def test_real_volumes_load_from_their_folder(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no data beside this checkout: {SHARED.parent.name}/{SHARED.name}")
    image, label, classes = SAMPLES[name]
    item = LoadVolumed(classes)(one_case(str(SHARED / name), image, label)[0])
    assert item["image"].shape == item["label"].shape
    assert len(item["label"].unique()) > 3


def test_a_file_that_is_not_there_is_named_with_those_that_are(small_set):
    with pytest.raises(FileNotFoundError, match=r"has no ct\.nii\.gz; it has dataset\.json, imagesTr, labelsTr"):
        one_case(str(small_set("decathlon")), "ct.nii.gz", "labels7.nii.gz")


@pytest.mark.parametrize("cases", [decathlon_cases, brats_cases, acdc_cases])
def test_an_absent_folder_says_how_to_name_it(cases, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*--set data_root=FOLDER"):
        cases(str(tmp_path / "absent"), "train")


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        (decathlon_cases, "no dataset.json"),
        (brats_cases, "no case folders"),
        (acdc_cases, r"no case folders patient\*"),
    ],
)
def test_an_empty_folder_is_refused(cases, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        cases(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        synapse_arrays(str(tmp_path / "absent"), "train", classes=9)


@pytest.mark.parametrize("missing", ["modality", "labels", "training"])
def test_a_task_without_an_entry_is_refused(copied, missing):
    root = copied("decathlon")
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({key: description[key] for key in description if key != missing}))
    with pytest.raises(ValueError, match=rf"dataset\.json lacks {missing}; a Decathlon task has"):
        decathlon_cases(str(root), "train")


def test_a_damaged_description_is_refused(copied):
    root = copied("decathlon")
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="is not JSON"):
        decathlon_cases(str(root), "train")
    (root / "dataset.json").write_text(text.replace('"label"', '"mask"'))
    with pytest.raises(ValueError, match=r"entry 0 of training is .*needs image and label"):
        decathlon_cases(str(root), "train")


def test_a_case_without_a_modality_is_named(copied):
    root = copied("brats")
    next(root.glob("*00002/*_t1ce.nii.gz")).unlink()
    with pytest.raises(FileNotFoundError, match=r"BraTS2021_00002 has no file that ends in _t1ce\.nii\.gz"):
        brats_cases(str(root), "train")


def test_two_files_of_a_modality_are_named(copied):
    root = copied("brats")
    first = next(root.glob("*00002/*_t2.nii.gz"))
    shutil.copyfile(first, first.with_name("older_t2.nii.gz"))
    with pytest.raises(ValueError, match=r"has 2 files of t2: .*leave one"):
        brats_cases(str(root), "train")


def test_labels_without_a_frame_are_named(copied):
    root = copied("acdc")
    (root / "patient002" / "patient002_frame12.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"patient002_frame12\.nii\.gz missing"):
        acdc_cases(str(root), "train", folds=3)
    for path in (root / "patient002").glob("*_gt.nii.gz"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"patient002 has no labelled frame .*it has patient002_4d"):
        acdc_cases(str(root), "train", folds=3)


def test_unknown_parts_folds_and_empty_parts_are_refused(small_set):
    root = str(small_set("decathlon"))
    with pytest.raises(ValueError, match="unknown part 'val'; parts are train and test"):
        decathlon_cases(root, "val")
    with pytest.raises(ValueError, match="fold 5 of 5 does not exist"):
        decathlon_cases(root, "test", fold=5)
    with pytest.raises(ValueError, match="3 cases give none to test in fold 4 of 5"):
        decathlon_cases(root, "test", fold=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, label: {"image": image}, "no array label; it has image"),
        (lambda image, label: {"image": image, "label": label[:-1]}, r"image \(24, 24\) and label \(23, 24\)"),
        (lambda image, label: {"image": image[None], "label": label[None]}, r"both need 2 axes"),
        (lambda image, label: {"image": image * np.nan, "label": label}, "NaN or infinite voxels of 576"),
        (lambda image, label: {"image": image, "label": label + 5}, "labels outside the classes 0 to 8: 9, 10;"),
    ],
)
def test_bad_arrays_are_refused(copied, change, message):
    root = copied("synapse")
    path = root / "train_npz" / "case0001_slice008.npz"
    with np.load(path) as arrays:
        changed = change(arrays["image"], arrays["label"])
    np.savez(path, **changed)
    with pytest.raises(ValueError, match=rf"case0001_slice008\.npz .*{message}"):
        synapse_arrays(str(root), "train", classes=9)


def test_truncated_arrays_are_refused(copied):
    root = copied("synapse")
    path = root / "train_npz" / "case0001_slice004.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or damaged"):
        synapse_arrays(str(root), "train", classes=9)


def test_a_volume_with_another_number_of_channels_is_refused(small_set):
    (case,) = brats_cases(str(small_set("brats")), "test", folds=3)
    with pytest.raises(ValueError, match="has 4 channels where 2 are expected"):
        LoadVolumed(classes=5, channels=2)(case)
    (case,) = decathlon_cases(str(small_set("decathlon")), "test", folds=3)
    with pytest.raises(ValueError, match="has 1 channels where 4 are expected"):
        LoadVolumed(classes=3, channels=4)(case)


def test_channels_along_the_fourth_axis_are_those_of_single_files(copied):
    root = copied("acdc")
    cine = root / "patient001" / "patient001_4d.nii.gz"
    image = LoadVolumed(classes=4, channels=12)({"image": str(cine)})["image"]
    assert image.shape == (12, 24, 24, 16)
    assert torch.equal(image[1], image[0])
    with pytest.raises(ValueError, match=r"4 dimensions \(24, 24, 16, 12\)"):
        LoadVolumed(classes=4)({"image": str(cine)})


def test_channels_on_different_grids_are_refused(copied):
    root = copied("brats")
    path = next(root.glob("*00000/*_flair.nii.gz"))
    rewrite(path, read_volume(path)[0][:-1])
    (case,) = brats_cases(str(root), "test", fold=1, folds=3)
    with pytest.raises(ValueError, match=r"channels .*_t1\.nii\.gz and .*_flair\.nii\.gz differ in shape"):
        LoadVolumed(classes=5, channels=4)(case)


def test_values_outside_the_classes_are_refused(small_set):
    (case,) = brats_cases(str(small_set("brats")), "test", fold=1, folds=3)
    with pytest.raises(ValueError, match="outside the classes 0, 1, 2, 3: 4"):
        LoadVolumed(classes=((0,), (1, 2), (3,)), channels=4)(case)


def test_background_alone_is_allowed_with_a_warning(copied):
    root = copied("decathlon")
    path = root / "labelsTr" / "case_0.nii.gz"
    rewrite(path, np.zeros((24, 24, 16), np.uint8))
    (case,) = decathlon_cases(str(root), "test", folds=3)
    with pytest.warns(UserWarning, match=r"case_0\.nii\.gz holds background alone"):
        assert not LoadVolumed(classes=3)(case)["label"].any()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("layout", ["decathlon", "brats", "acdc"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"is truncated or damaged"),
        (lambda path: rewrite(path, read_volume(path)[0] + 9), "outside the classes"),
        (lambda path: rewrite(path, read_volume(path)[0][:-1]), "differ in shape"),
        (Path.unlink, "no such volume|has no file that ends|has no labelled frame"),
    ],
)
def test_training_on_a_bad_file_is_one_line_that_names_it(copied, tmp_path, capsys, layout, damage, message):
    root = copied(layout)
    pattern = {"decathlon": "labelsTr/case_1*", "brats": "*00002/*_seg*", "acdc": "patient002/*_gt*"}[layout]
    for path in root.glob(pattern):
        damage(path)
    before = threading.active_count()
    config = {"decathlon": "decathlon_umamba", "brats": "brats_umamba", "acdc": "acdc_vm_unet"}[layout]
    assert main(["train", f"medical/{config}", "--work-dir", str(tmp_path / "run"), "--set", f"data_root={root}"]) == 2
    assert threading.active_count() == before  # one that is at work when the process ends aborts it
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert path.parent.name in line
    assert not any(tmp_path.glob("run/*"))


@pytest.mark.parametrize("how", ["pixdim", "affine"])
def test_a_spacing_of_zero_is_refused(tmp_path, how):
    path = tmp_path / "flat.nii"
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4))
    image.set_sform(np.diag([1.0, 1.0, 0.0 if how == "affine" else 1.0, 1.0]), code=1)
    nibabel.save(image, path)
    if how == "pixdim":
        content = bytearray(path.read_bytes())
        content[88:92] = bytes(4)  # float32 pixdim[3]
        path.write_bytes(content)
    with pytest.raises(ValueError, match="spacing of zero"):
        read_volume(path)
