"""Cine volumes as clips."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from vision_ssm.data.cine import CineSlices, acdc_cines, evenly, nifti_cines

SHORT_AXIS = np.diag([1.5, 2.0, 8.0, 1.0])  # mm


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = SHORT_AXIS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def heart(frames: int = 10) -> np.ndarray:
    """A cine (20, 16, 3, t): slice z is a ramp from 100 z along x, on which a square gets brighter."""
    cine = np.zeros((20, 16, 3, frames), np.int16)
    cine += np.arange(20, dtype=np.int16)[:, None, None, None] + (100 * np.arange(3, dtype=np.int16))[:, None]
    cine[8:12, 6:10] += (20 * np.arange(frames)).astype(np.int16)
    return cine


def labels(first: int) -> np.ndarray:
    """A label map (20, 16, 3) with 3 in the square, and ``first`` in the corner."""
    label = np.zeros((20, 16, 3), np.uint8)
    label[8:12, 6:10], label[0, 0] = 3, first
    return label


@pytest.fixture
def acdc(tmp_path):
    """Three patients, labelled in the first and the eighth of ten frames."""
    for number in (1, 2, 3):
        stem = tmp_path / "acdc" / f"patient{number:03}" / f"patient{number:03}"
        save(stem.with_name(f"{stem.name}_4d.nii.gz"), heart())
        for frame, first in ((1, 1), (8, 2)):
            save(stem.with_name(f"{stem.name}_frame{frame:02}_gt.nii.gz"), labels(first))
    return tmp_path / "acdc"


def scaled(voxels: np.ndarray) -> torch.Tensor:
    low, high = np.percentile(heart(), (1, 99))
    return torch.from_numpy(((voxels - low) / (high - low) * 2 - 1).clip(-1, 1)).float()


def test_every_slice_of_a_cine_is_a_clip(acdc):
    clips = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(20, 16), classes=4)
    assert len(clips) == 3
    for z, item in enumerate(map(clips.__getitem__, range(3))):
        assert item["video"].dtype == torch.float32 and item["label"].dtype == torch.int64
        torch.testing.assert_close(item["video"][:, 0], scaled(heart()[:, :, z]).movedim(-1, 0))
        assert item["spacing"].tolist() == [1.5, 2.0]
        assert [int(frame.max()) for frame in item["label"]] == [3, -1, -1, -1, -1, -1, -1, 3, -1, -1]
        for number, first in ((0, 1), (7, 2)):
            assert torch.equal(item["label"][number, 0], torch.from_numpy(labels(first)[..., z]).long())


def test_frames_are_spread_over_the_beat_with_those_that_have_labels(acdc):
    clips = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=4, size=(20, 16), classes=4)
    # Frames 0, 2, 5 and 7 as they come; of them the fourth, frame 7, is labelled.
    torch.testing.assert_close(clips[1]["video"][:, 0], scaled(heart()[:, :, 1, [0, 2, 5, 7]]).movedim(-1, 0))
    assert [int(frame.max()) for frame in clips[1]["label"]] == [3, -1, -1, 3]
    assert evenly(10, 4, [0, 6]) == [0, 2, 6, 7]
    assert evenly(30, 3, [11, 12, 13]) == [11, 12, 13]
    assert evenly(7, 7, [3]) == list(range(7))


def test_slices_are_cropped_and_padded_alike_on_both_sides(acdc):
    item = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(10, 20), classes=4)[0]
    torch.testing.assert_close(item["video"][:, 0, :, 2:18], scaled(heart()[5:15, :, 0]).movedim(-1, 0))
    assert (item["video"][..., [0, 1, 18, 19]] == -1).all()
    assert (item["label"][7, ..., [0, 1, 18, 19]] == 0).all() and (item["label"][6] == -1).all()
    assert torch.equal(item["label"][7, 0, :, 2:18], torch.from_numpy(labels(2)[5:15, :, 0]).long())


def test_slices_are_resampled_to_one_spacing(acdc):
    item = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(10, 11), spacing=3.0, classes=4)[0]
    assert item["spacing"].tolist() == [3.0, pytest.approx(2.0 * 16 / 11)]
    expected = interpolate(scaled(heart()[:, :, 0]).movedim(-1, 0)[None], (10, 11), mode="bilinear", antialias=True)
    torch.testing.assert_close(item["video"][:, 0], expected[0])
    assert set(item["label"][7].unique().tolist()) <= {0, 2, 3} and (item["label"][7, 0, 4:6, 4:6] == 3).all()


def test_patients_are_split_and_every_one_is_tested_once(acdc):
    tested = [case["video"] for fold in range(3) for case in acdc_cines(str(acdc), "test", fold, folds=3)]
    assert len(set(tested)) == len(tested) == 3
    train, test = ({case["video"] for case in acdc_cines(str(acdc), part, folds=3)} for part in ("train", "test"))
    assert (len(train), len(test)) == (2, 1) and not train & test


def test_cines_without_labels_are_clips_too(tmp_path):
    for name in ("a.nii.gz", "deeper/b.nii"):
        save(tmp_path / name, heart())
    train, test = (nifti_cines(str(tmp_path), part, folds=2) for part in ("train", "test"))
    assert [Path(case["video"]).name for case in (*test, *train)] == ["a.nii.gz", "b.nii"]
    batch = next(iter(DataLoader(CineSlices(train, frames=5, size=(16, 16)), batch_size=3)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {"video": (3, 5, 1, 16, 16), "spacing": (3, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"spacing": -1.0}, r"spacing=-1\.0"),
        ({"frames": 11}, r"4d\.nii\.gz has 10 frames, a clip 11; take fewer"),
        ({"frames": 1}, "has labels of 2 frames, a clip 1 frames; take more"),
        ({"classes": 3}, r"frame01_gt\.nii\.gz holds labels outside the classes 0 to 2: 3"),
    ],
)
def test_settings_that_do_not_fit_the_cine_are_refused(change, message, acdc):
    with pytest.raises(ValueError, match=message):
        CineSlices(
            **{"cases": acdc_cines(str(acdc), "test", folds=3), "frames": 4, "size": (8, 8), "classes": 4} | change
        )


@pytest.mark.parametrize(
    ("name", "voxels", "message"),
    [
        ("4d", heart()[..., 0], r"4d\.nii\.gz has 3 dimensions \(20, 16, 3\); a cine has 4"),
        ("4d", np.full((20, 16, 3, 10), 7, np.int16), "has no contrast: most of its voxels are 7"),
        ("4d", heart(7), "has 7 frames, and there are labels of frame 8; remove them"),
        ("4d", np.full((20, 16, 3, 10), np.nan, np.float32), "holds 9600 NaN"),
        ("frame08_gt", labels(1)[:10], r"cine .* and label .*frame08.* differ in shape"),
    ],
)
def test_bad_cines_are_named(name, voxels, message, acdc):
    path = save(acdc / "patient001" / f"patient001_{name}.nii.gz", voxels)
    with pytest.raises(ValueError, match=message) as caught:
        CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=4, size=(8, 8), classes=4)
    assert str(path) in str(caught.value)


def test_a_cine_that_lacks_something_is_named(acdc, tmp_path):
    cine = acdc / "patient001" / "patient001_4d.nii.gz"
    with pytest.raises(ValueError, match="comes without labels; leave out classes"):
        CineSlices([{"video": str(cine), "labels": {}}], frames=4, size=(8, 8), classes=4)
    cine.write_bytes(cine.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"patient001_4d\.nii\.gz is truncated or damaged"):
        CineSlices([{"video": str(cine), "labels": {}}], frames=4, size=(8, 8))
    cine.unlink()
    with pytest.raises(FileNotFoundError, match=r"patient001 needs one cine .*; it has patient001_frame01"):
        acdc_cines(str(acdc), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.nii or \.nii\.gz file; it has nothing"):
        nifti_cines(str(tmp_path / "empty"), "train")
