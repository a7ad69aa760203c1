"""Volumes in, label maps out: NIfTI and DICOM, one and many, on the input's grid, whole or not at all."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.data import PydicomReader
from numpy.testing import assert_allclose
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console

from vision_ssm.data.dicom import read_series
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.segmentation import predict
from vision_ssm.engine.segmentation.cases import find_cases
from vision_ssm.engine.segmentation.predict import predict_file, predict_folder
from vision_ssm.engine.segmentation.predictor import Predictor
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.tools.__main__ import main

ROOT = Path(__file__).parents[2]
BANDS = str(ROOT / "tests" / "fixtures" / "bands.py")
QUIET = Console(quiet=True)
SHAPE = (12, 10, 7)
OBLIQUE = np.array([[0.0, -1.5, 0.2, 30.0], [0.8, 0.0, 0.0, -20.0], [0.0, 0.1, 2.5, 5.0], [0.0, 0.0, 0.0, 1.0]])
SLOPE, INTERCEPT = 0.5, -4.0


def truth(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Random classes 0 to 2, as uint8, in blocks of two voxels a side."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 3, size=[-(-size // 2) for size in shape], dtype=np.uint8)
    return np.kron(blocks, np.ones((2, 2, 2), np.uint8))[: shape[0], : shape[1], : shape[2]]


def image_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Intensities whose nearest whole number is the class."""
    return (labels + np.random.default_rng(seed).uniform(-0.4, 0.4, labels.shape)).astype(np.float32)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def save_series(folder: Path, labels: np.ndarray, spacing: tuple[float, float, float] = (0.75, 1.5, 3.0)) -> Path:
    """A series with the classes as intensities: axis z runs to the feet, names and instance numbers in no order.

    Args:
        spacing: millimetres between columns, rows and slices.
    """
    folder.mkdir(parents=True)
    uid = generate_uid()
    order = np.random.default_rng(0).permutation(labels.shape[2])
    for z in range(labels.shape[2]):
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.SOPClassUID, item.SOPInstanceUID, item.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
        item.InstanceNumber = int(order[z]) + 1
        item.ImagePositionPatient = [-20.0, 35.0, 100.0 - spacing[2] * z]
        item.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]  # to the left, then to the front: the normal is to the feet
        item.PixelSpacing = [spacing[1], spacing[0]]
        item.SliceThickness = 99.0  # not what lies between slices
        item.Columns, item.Rows = labels.shape[:2]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 1
        item.RescaleSlope, item.RescaleIntercept = SLOPE, INTERCEPT
        stored = (labels[..., z].astype(np.float64) - INTERCEPT) / SLOPE
        item.PixelData = stored.T.astype(np.int16).tobytes()
        item.save_as(folder / f"{order[z]:03}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture
def predictor(bands: Path) -> Predictor:
    config = load_config(BANDS)
    return Predictor(config, load_task(config, bands))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three cases: a file, an uncompressed file and a series."""
    cases = tmp_path / "cases"
    cases.mkdir()
    save(cases / "a.nii.gz", image_of(truth(1)))
    save(cases / "b.nii", image_of(truth(2)))
    save_series(cases / "c", truth(3))
    (cases / "notes.txt").write_text("not a volume")
    return cases


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def labels_in(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_labels_lie_on_the_very_grid_of_an_oblique_volume(predictor, tmp_path):
    source = nibabel.Nifti1Image(image_of(truth()), OBLIQUE)
    source.set_sform(OBLIQUE, 4)
    source.set_qform(np.diag([-1.5, 0.8, 2.5, 1.0]), 1)
    source.header.set_xyzt_units("mm")
    nibabel.save(source, tmp_path / "in.nii")
    written = predict_file(predictor, tmp_path / "in.nii", tmp_path / "out.nii.gz", probabilities=True)
    source, labels, chances = (nibabel.load(path) for path in (tmp_path / "in.nii", *written.maps()[::2]))
    assert (labels_in(written.labels) == truth()).all()
    assert labels.get_data_dtype() == np.uint8
    for found in (labels, chances):
        assert (found.affine == source.affine).all()
        assert (found.get_qform() == source.get_qform()).all()
        assert [int(found.header[code]) for code in ("sform_code", "qform_code")] == [4, 1]
        assert found.header.get_zooms()[:3] == source.header.get_zooms()
        assert found.header.get_xyzt_units()[0] == "mm"
    assert chances.shape == (*SHAPE, 3)
    assert_allclose(chances.get_fdata().sum(-1), np.ones(SHAPE), atol=1e-6)
    assert (chances.get_fdata().argmax(-1) == truth()).all()
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.nii", "out.nii.gz", "out.png", "out.csv", "out_probabilities.nii.gz"
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(*SHAPE, 1), (*SHAPE, 1, 1)], ids=str)
def test_a_volume_with_further_axes_of_one_place_is_labelled(predictor, tmp_path, shape):
    image = save(tmp_path / "IN.NII.GZ", image_of(truth()).reshape(shape))
    assert [case.name for case in find_cases(tmp_path)] == ["IN"]
    assert (labels_in(predict_file(predictor, image, tmp_path / "out.nii.gz").labels) == truth()).all()


def test_volumes_are_in_millilitres(predictor, tmp_path):
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:7, 2:6, 2:4] = 2  # 40 voxels of 3 x 2 x 5 mm
    save(tmp_path / "in.nii", labels.astype(np.float32), np.diag([-3.0, 2.0, 5.0, 1.0]))
    written = predict_file(predictor, tmp_path / "in.nii", tmp_path / "out.nii")
    assert table(written.volumes) == [
        {"case": "in", "class": "low", "label": "1", "voxels": "0", "millilitres": "0"},
        {"case": "in", "class": "high", "label": "2", "voxels": "40", "millilitres": "1.2"},
    ]


def test_resampling_of_the_config_is_undone(bands, tmp_path):
    load, spacing = "vision_ssm.data.volumes.LoadVolumed", "monai.transforms.Spacingd"
    prepare = [{"type": load, "classes": 3}, {"type": spacing, "keys": "image", "pixdim": (2, 2, 2)}]
    config = load_config(BANDS, [f"prepare={prepare}"])
    labels = np.zeros((20, 24, 16), np.uint8)
    labels[4:14, 6:18, 4:12] = 2
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    affine[:3, 3] = 7.0, -3.0, 11.0
    save(tmp_path / "in.nii", labels.astype(np.float32), affine)
    written = predict_file(Predictor(config, load_task(config, bands)), tmp_path / "in.nii", tmp_path / "out.nii")
    found = nibabel.load(written.labels)
    assert found.shape == labels.shape
    assert (found.affine == affine).all()
    core, outside = labels_in(written.labels)[6:12, 8:16, 6:10], np.ones(labels.shape, bool)
    outside[2:16, 4:20, 2:14] = False
    assert (core == 2).all()
    assert (labels_in(written.labels)[outside] == 0).all()


def test_a_series_is_read_by_position_and_rescaled(tmp_path):
    labels = truth()
    voxels, affine = read_series(save_series(tmp_path / "series", labels))
    assert voxels.dtype == np.float32
    assert (voxels == labels).all()
    corner = affine @ [0, 0, 0, 1]
    assert_allclose(corner[:3], np.array([20.0, -35.0, 100.0]))  # right, front, up from left, back, up
    assert_allclose(affine[:3, :3], np.diag([-0.75, 1.5, -3.0]), atol=1e-6)


def test_a_series_agrees_with_monai(tmp_path):
    """Their reader takes the order from instance numbers, so it gets a series where both orders agree."""
    save_series(tmp_path / "series", truth())
    for path in (tmp_path / "series").iterdir():
        item = pydicom.dcmread(path)
        item.InstanceNumber = round((100 - item.ImagePositionPatient[2]) / 3)
        item.save_as(path)
    voxels, affine = read_series(tmp_path / "series")
    reader = PydicomReader()
    theirs, meta = reader.get_data(reader.read(tmp_path / "series"))
    assert_allclose(voxels, theirs)
    assert_allclose(affine, meta["affine"], atol=1e-5)


def test_a_series_gets_a_label_map_on_its_grid(predictor, tmp_path):
    series = save_series(tmp_path / "series", truth())
    written = predict_file(predictor, series, tmp_path / "out.nii.gz")
    assert (labels_in(written.labels) == truth()).all()
    assert_allclose(nibabel.load(written.labels).affine, read_series(series)[1], atol=1e-5)
    assert table(written.volumes)[0]["case"] == "series"


def edited(series: Path, **fields: object) -> None:
    """Changes one slice of a series, an inner one."""
    path = next(p for p in sorted(series.iterdir()) if pydicom.dcmread(p).ImagePositionPatient[2] == 91)
    item = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(item, name, value)
    item.save_as(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, r"holds 2 series, SeriesInstanceUID 1\.2\.3 \(1 files\), .* \(6 files\); put"),
        ({"ImagePositionPatient": [-20, 35, 88]}, r"two slices at the position \[-20\.0, 35\.0, 88\.0\] mm"),
        ({"ImagePositionPatient": [-20, 35, 91.5]}, "not evenly spaced: 2.5 to 3.5 mm apart"),
        ({"PixelSpacing": [1, 1]}, "differ in PixelSpacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "differ in ImageOrientationPatient"),
        ({"Rows": 5, "Columns": 24}, "differ in Rows"),
        ({"NumberOfFrames": 2}, "several frames or colours"),
        ({"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ({"PixelData": b"12"}, "pixels of .* cannot be read"),
    ],
)
def test_a_series_that_is_no_single_volume_is_refused(tmp_path, fields, message):
    series = save_series(tmp_path / "series", truth())
    edited(series, **fields)
    with pytest.raises(ValueError, match=message):
        read_series(series)


@pytest.mark.parametrize("kept", [0, 100, 200, 700])
def test_a_truncated_slice_is_refused(tmp_path, kept):
    series = save_series(tmp_path / "series", truth())
    whole = (series / "003.dcm").read_bytes()
    (series / "003.dcm").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"003\.dcm .*(truncated|cannot be read)"):
        read_series(series)


@pytest.mark.parametrize(
    ("written", "damage", "message"),
    [
        (b"PixelSpacing", b"1.5\\x.75", "as its PixelSpacing, which is 2 numbers"),
        (b"SeriesInstanceUID", b"\x20\x00\x0e\x00U?", "Unknown Value Representation"),
        (b"RescaleSlope", b"x.5 ", "cannot be read"),
    ],
)
def test_a_damaged_entry_is_of_its_file(tmp_path, written, damage, message):
    series = save_series(tmp_path / "series", truth())
    whole = (series / "003.dcm").read_bytes()
    entries = {b"PixelSpacing": b"1.5\\0.75", b"SeriesInstanceUID": b"\x20\x00\x0e\x00UI", b"RescaleSlope": b"0.5 "}
    assert whole.count(entries[written]) == 1
    (series / "003.dcm").write_bytes(whole.replace(entries[written], damage))
    with pytest.raises(ValueError, match=rf"003\.dcm .*{message}"):
        read_series(series)


def test_a_missing_slice_is_noticed(tmp_path):
    series = save_series(tmp_path / "series", truth())
    edited(series)
    next(p for p in series.iterdir() if pydicom.dcmread(p).ImagePositionPatient[2] == 91).unlink()
    with pytest.raises(ValueError, match="not evenly spaced: 3 to 6 mm apart; a slice is missing"):
        read_series(series)


def test_a_series_without_spacing_is_refused(tmp_path):
    series = save_series(tmp_path / "series", truth(), spacing=(0, 1, 1))
    with pytest.raises(ValueError, match=r"spacing of zero or less: \[0\.0, 1\.0, 1\.0\] mm"):
        read_series(series)
    with pytest.raises(FileNotFoundError, match="no DICOM file"):
        read_series(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"PixelSpacing": [-1, 1]}, r"spacing of zero or less: \[1\.0, -1\.0, 3\.0\] mm"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no two directions at right angles"),
    ],
)
def test_a_series_on_no_grid_is_refused(tmp_path, fields, message):
    series = save_series(tmp_path / "series", truth())
    for path in series.iterdir():
        item = pydicom.dcmread(path)
        item.update(fields)
        item.save_as(path)
    with pytest.raises(ValueError, match=message):
        read_series(series)


@pytest.mark.parametrize("name", ["{}", "1.2.3.{}", "{}.DCM", "{}.ima"])
def test_a_damaged_outer_slice_is_not_left_out_whatever_it_is_called(tmp_path, name):
    """Without it, the others would be a volume too."""
    series = save_series(tmp_path / "series", truth())
    (series / "DICOMDIR").write_bytes(b"")
    (series / "series.json").write_text("{}")
    for path in series.glob("*.dcm"):
        z = round((100 - pydicom.dcmread(path).ImagePositionPatient[2]) / 3)
        path.rename(series / name.format(z))
    assert read_series(series)[0].shape == SHAPE
    last = series / name.format(SHAPE[2] - 1)
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated or no DICOM file"):
        read_series(series)


def test_a_folder_of_cases_is_labelled_and_the_finished_are_kept(predictor, folder, tmp_path):
    out = tmp_path / "out"
    batch = predict_folder(predictor, folder, out, console=QUIET)
    assert (batch.written, batch.kept, batch.failed) == (["a", "b", "c"], [], {})
    for number, name in enumerate("abc", start=1):
        assert (labels_in(out / f"{name}.nii.gz") == truth(number)).all()
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"volumes.csv", *(f"{n}.nii.gz" for n in "abc"), *(f"overlays/{n}.png" for n in "abc")}
    first = table(out / "volumes.csv")
    assert [row["case"] for row in first] == [*"aabbcc"]

    (out / "b.nii.gz").unlink()
    (out / "volumes.csv").unlink()
    stamps = {name: (out / f"{name}.nii.gz").stat().st_mtime_ns for name in "ac"}
    again = predict_folder(predictor, folder, out, console=QUIET)
    assert (again.written, again.kept, again.failed) == (["b"], ["a", "c"], {})
    assert {name: (out / f"{name}.nii.gz").stat().st_mtime_ns for name in "ac"} == stamps
    assert table(out / "volumes.csv") == first

    more = predict_folder(predictor, folder, out, console=QUIET, probabilities=True)
    assert more.written == [*"abc"]
    assert nibabel.load(out / "probabilities" / "c.nii.gz").shape == (*SHAPE, 3)
    assert predict_folder(predictor, folder, out, console=QUIET, overwrite=True).written == [*"abc"]


def test_a_case_whose_image_was_changed_is_labelled_anew(predictor, folder, tmp_path):
    out = tmp_path / "out"
    predict_folder(predictor, folder, out, console=QUIET)
    save(folder / "a.nii.gz", image_of(truth(9)))
    batch = predict_folder(predictor, folder, out, console=QUIET)
    assert (batch.written, batch.kept) == (["a"], ["b", "c"])
    assert (labels_in(out / "a.nii.gz") == truth(9)).all()


def test_the_labels_of_another_network_are_not_kept_for_this_ones(predictor, folder, bands, tmp_path):
    out = tmp_path / "out"
    predict_folder(predictor, folder, out, console=QUIET)
    config = load_config(BANDS)
    flipped = Predictor(config, load_task(config, bands), flips="x")
    with pytest.raises(FileExistsError, match=r"a\.nii\.gz exists and is not by these weights .* --overwrite"):
        predict_folder(flipped, folder, out, console=QUIET)
    assert predict_folder(flipped, folder, out, console=QUIET, overwrite=True).written == [*"abc"]
    task = load_task(config, bands)
    with torch.no_grad():
        task.net.bias[0] += 1e-3
    assert Predictor(config, task).mark != predictor.mark


def test_bad_cases_are_reported_and_the_others_written(bands, folder, tmp_path, capsys):
    (folder / "a.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:300])
    bad = image_of(truth())
    bad[0, 0, 0] = np.nan
    save(folder / "d.nii", bad)
    save(folder / "e.nii", np.zeros((3, 3, 3, 2), np.float32))
    edited(folder / "c", SeriesInstanceUID="1.2.3")
    (folder / "f").mkdir()
    out = tmp_path / "out"
    command = ["predict", BANDS, str(bands), str(folder), str(out)]
    assert main(command) == 1
    shown = capsys.readouterr()
    reasons = dict(line.removeprefix("vision-ssm: ").split(" failed: ") for line in shown.err.splitlines())
    assert sorted(reasons) == ["a", "c", "d", "e", "f"]
    for name, words in {
        "a": "readable", "c": "SeriesInstanceUID 1.2", "d": "1 NaN or infinite", "e": "4 dimensions", "f": "neither"
    }.items():  # fmt: skip
        assert words in reasons[name]
    assert "1 labelled, 0 kept from before, 5 failed" in shown.out
    assert [path.name for path in out.glob("*.nii.gz")] == ["b.nii.gz"]
    assert {row["case"] for row in table(out / "volumes.csv")} == {"b"}
    assert not list(out.rglob(".partial*"))


KILLED = """
import os, signal, sys
import nibabel
from vision_ssm.tools.__main__ import main

save = nibabel.save

def dies(image, path):
    save(image, path)
    if "b.nii" in str(path):
        with open(path, "rb+") as file:
            file.truncate(file.seek(0, 2) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

nibabel.save = dies
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_file_the_same_command_goes_on(bands, folder, tmp_path, predictor):
    out = tmp_path / "out"
    command = ["predict", BANDS, str(bands), str(folder), str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in sorted(out.glob("[!.]*.nii.gz"))] == ["a.nii.gz"]
    assert (labels_in(out / "a.nii.gz") == truth(1)).all()
    assert {row["case"] for row in table(out / "volumes.csv")} == {"a"}
    stamp = (out / "a.nii.gz").stat().st_mtime_ns
    batch = predict_folder(predictor, folder, out, console=QUIET)  # in another process: the mark must be the same
    assert (batch.written, batch.kept, batch.failed) == (["b", "c"], ["a"], {})
    assert (out / "a.nii.gz").stat().st_mtime_ns == stamp
    assert (labels_in(out / "b.nii.gz") == truth(2)).all()
    assert not list(out.rglob(".partial*"))


def test_a_failing_write_leaves_no_label_map(predictor, folder, tmp_path, monkeypatch):
    save_whole = nibabel.save

    def fails(image, path):
        save_whole(image, path)
        if "b.nii" in str(path):
            raise OSError("disk full")

    monkeypatch.setattr(predict.nibabel, "save", fails)
    batch = predict_folder(predictor, folder, tmp_path / "out", console=QUIET)
    assert batch.failed == {"b": "disk full"}
    assert [path.name for path in sorted((tmp_path / "out").glob("*.nii.gz"))] == ["a.nii.gz", "c.nii.gz"]


def test_flips_average_probabilities(bands, tmp_path):
    """A network that only looks to one side: averaged over flips, it looks to both alike."""
    config = load_config(
        BANDS, ["model.net.kernel_size=3", "model.net.padding=1", "model.inferer.roi_size=(12, 10, 7)"]
    )
    task = build(config.model).eval()
    image = save(tmp_path / "in.nii", image_of(truth()), np.eye(4))
    plain, flipped = Predictor(config, task)([image]), Predictor(config, task, flips="xz")([image])
    mirror = save(tmp_path / "mirror.nii", image_of(truth())[::-1, :, ::-1].copy(), np.eye(4))
    assert_allclose(Predictor(config, task, flips="zx")([mirror])[:, ::-1, :, ::-1], flipped, atol=1e-5)
    assert np.abs(plain - flipped).max() > 0.01
    assert_allclose(flipped.sum(axis=0), np.ones(SHAPE, np.float32), atol=1e-5)
    for axes in ("xw", "xx"):
        with pytest.raises(ValueError, match="give some of the axes x, y and z"):
            Predictor(config, task, flips=axes)


def test_cases_of_several_channels_are_put_together(tmp_path):
    for name in ("p_0000", "p_0001", "q_0001", "q_0000", "r"):
        save(tmp_path / f"{name}.nii.gz", np.zeros((2, 2, 2)))
    (tmp_path / "s").mkdir()
    for name in ("s-t2", "s-t1", "s-seg"):
        save(tmp_path / "s" / f"{name}.nii.gz", np.zeros((2, 2, 2)))
    names = {case.name: [path.name for path in case.images()] for case in find_cases(tmp_path)[:3]}
    assert names == {
        "p": ["p_0000.nii.gz", "p_0001.nii.gz"], "q": ["q_0000.nii.gz", "q_0001.nii.gz"], "r": ["r.nii.gz"]
    }  # fmt: skip
    subject = find_cases(tmp_path, ("t1", ("t2w", "t2")))[-1]
    assert [path.name for path in subject.images()] == ["s-t1.nii.gz", "s-t2.nii.gz"]
    assert subject.name == "s"
    (alone,) = find_cases(tmp_path / "s", ("t1", ("t2w", "t2")))
    assert (alone.name, alone.images()) == ("s", subject.images())
    save(tmp_path / "s" / "other.nii.gz", np.zeros((2, 2, 2)))
    assert [case.name for case in find_cases(tmp_path / "s", ("t1", ("t2w", "t2")))] == ["other", "s"]
    (tmp_path / "s" / "other.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"holds s-seg\.nii\.gz, .* channels \[0, 0, 0\] of s; .*s_0000"):
        find_cases(tmp_path)[-1].images()
    (tmp_path / "q_0000.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"channels \[1\] of q; each of \[0\]"):
        find_cases(tmp_path)[1].images()
    (tmp_path / "r").mkdir()
    with pytest.raises(ValueError, match="a file and a folder for r"):
        find_cases(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_predicted_is_one_line(bands, folder, tmp_path, capsys):
    command = ["predict", BANDS, bands]
    image, empty = folder / "a.nii.gz", tmp_path / "empty"
    empty.mkdir()
    assert "no such volume" in refused(capsys, *command, tmp_path / "absent", tmp_path / "out")
    assert "no case in" in refused(capsys, *command, empty, tmp_path / "out")
    assert "holds 3 cases; give a folder" in refused(capsys, *command, folder, tmp_path / "out.nii.gz")
    assert "lies among the images" in refused(capsys, *command, folder, folder / "out")
    assert "lies among the images" in refused(capsys, *command, image, folder, "--overwrite")
    assert "is the input itself" in refused(capsys, *command, image, image, "--overwrite")
    assert "must end in .nii" in refused(capsys, *command, image, tmp_path / "out.png")
    assert "cannot write to" in refused(capsys, *command, folder, bands / "out")
    assert "cannot write to /proc" in refused(capsys, *command, image, "/proc/out.nii.gz")
    swapped = refused(capsys, "predict", BANDS, image, bands, tmp_path / "out.nii")
    assert "another kind of file" in swapped and "weights_only" not in swapped
    slices = tmp_path / "series"
    save_series(slices, truth())
    assert "give the folder that holds them all" in refused(capsys, *command, slices / "000.dcm", tmp_path / "out.nii")
    assert "axes x, y and z" in refused(capsys, *command, image, tmp_path / "out.nii", "--flips", "up")
    save(tmp_path / "out.nii", np.zeros((2, 2, 2)))
    assert "--overwrite" in refused(capsys, *command, image, tmp_path / "out.nii")
    empty.joinpath("a.nii.gz").write_text("precious")
    assert "--overwrite" in refused(capsys, *command, folder, empty)
    assert empty.joinpath("a.nii.gz").read_text() == "precious"


def test_another_number_of_channels_is_refused(tmp_path):
    config = load_config(BANDS, ["model.net.in_channels=2"])
    predictor = Predictor(config, build(config.model).eval())
    image = save(tmp_path / "in.nii", image_of(truth()))
    with pytest.raises(ValueError, match=r"in\.nii prepared .* has 1 channels, the network takes 2"):
        predict_file(predictor, image, tmp_path / "out.nii")


def test_a_network_of_other_classes_is_refused(tmp_path):
    """One that says nothing of them before it is run."""
    config = load_config(BANDS)
    task = build(config.model).eval()
    task.net = torch.nn.Sequential(task.net, torch.nn.Conv3d(3, 5, 1))
    image = save(tmp_path / "in.nii", image_of(truth()))
    with pytest.raises(ValueError, match=r"gives 5 classes, the config has 3 \(background, low, high\); change"):
        predict_file(Predictor(config, task), image, tmp_path / "out.nii")


def test_output_that_is_not_finite_is_refused(tmp_path):
    config = load_config(BANDS)
    task = build(config.model).eval()
    torch.nn.init.constant_(task.net.weight, torch.inf)
    with pytest.raises(ValueError, match="is not finite; check its weights"):
        predict_file(Predictor(config, task), save(tmp_path / "in.nii", image_of(truth())), tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()


def test_cases_of_two_channels_are_labelled(tmp_path):
    """The class is the sum of both channels: as two files, a folder, a series beside a file, and one 4-D file."""
    config = load_config(BANDS, ["prepare.0.channels=2", "model.net.in_channels=2"])
    task = build(config.model).eval()
    centres = torch.arange(3.0)
    with torch.no_grad():
        task.net.weight.copy_((20 * centres).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1))
        task.net.bias.copy_(-10 * centres**2)
    cases = tmp_path / "cases"
    parts = image_of(truth()) - 5, np.full(SHAPE, 5, np.float32)
    (cases / "b").mkdir(parents=True)
    for channel, part in enumerate(parts):
        save(cases / f"a_{channel:04}.nii.gz", part)
        save(cases / "b" / f"scan_{channel:04}.nii.gz", part)
    series = save_series(cases / "c_0000", truth())
    save(cases / "c_0001.nii", np.zeros(SHAPE, np.float32), read_series(series)[1])
    save(cases / "d.nii.gz", np.stack(parts, axis=-1))
    save(cases / "e.nii.gz", parts[0])
    save(cases / "f_0000.nii", parts[0])
    save(cases / "f_0001.nii", parts[1], np.eye(4))
    batch = predict_folder(Predictor(config, task), cases, tmp_path / "out", console=QUIET)
    assert batch.written == [*"abcd"]
    for name in "abcd":
        assert (labels_in(tmp_path / "out" / f"{name}.nii.gz") == truth()).all()
    assert "1 channels where 2 are expected" in batch.failed["e"]
    assert "different grids" in batch.failed["f"]


def test_what_the_config_cuts_away_is_background(tmp_path):
    load, crop = "vision_ssm.data.volumes.LoadVolumed", "monai.transforms.CropForegroundd"
    prepare = [{"type": load, "classes": 3}, {"type": crop, "keys": "image", "source_key": "image"}]
    config = load_config(BANDS, [f"prepare={prepare}"])
    task = build(config.model).eval()
    with torch.no_grad():
        task.net.weight.zero_()
        task.net.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))  # all that it sees is high
    voxels = np.zeros(SHAPE, np.float32)
    voxels[3:9, 2:7, 1:4] = 1
    chances = Predictor(config, task)([save(tmp_path / "in.nii", voxels)])
    assert (chances.argmax(axis=0) == 2 * voxels).all()
    assert_allclose(chances.sum(axis=0), np.ones(SHAPE), atol=1e-6)


def test_spacing_of_zero_and_missing_files_are_refused(predictor, tmp_path):
    path = save(tmp_path / "in.nii", image_of(truth()), np.diag([1.0, 2.0, 3.0, 1.0]))
    content = bytearray(path.read_bytes())
    content[80:84] = bytes(4)  # pixdim[1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"in\.nii has a spacing of zero"):
        predict_file(predictor, path, tmp_path / "out.nii")
    with pytest.raises(FileNotFoundError, match="no such volume"):
        predict_file(predictor, tmp_path / "absent.nii", tmp_path / "out.nii")
    assert [path.name for path in tmp_path.iterdir()] == ["in.nii"]
