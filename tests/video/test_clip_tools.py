"""The commands on clips that are whole: the class of a clip, the labels and scores of a cine, end to end."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.testing import assert_close

from vision_ssm.data.draws import Draws
from vision_ssm.data.video_files import read_video
from vision_ssm.engine.checkpoint import save_weights
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.cine import CinePredictor, by_frame
from vision_ssm.engine.video.classification import classify_file
from vision_ssm.engine.video.encoding import write_video
from vision_ssm.tools import __main__ as cli

HEADING, CINE = "video/moving_digits_heading", "video/acdc_cine_unet"
NARROW = ["model.net.backbone=test_vmamba", "model.net.dim=8"]
SMALL = ["model.net.net.backbone=test_vmamba", "model.net.levels=(-1,)"]
QUIET = Console(quiet=True)


def refused(capsys, *arguments: object) -> str:
    """The one line that a failing command writes."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vision-ssm: error: ") and error.count("\n") == 1
    return error


def drawn(path: Path, config, scale: float = 1.0) -> Path:
    """Weights of a config's network as it is initialised, or ``scale`` times as large."""
    net = build(config.model.net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    save_weights(path, net, config="drawn", classes=(), channels=1)
    return path


# Which class a clip shows


@pytest.fixture(scope="module")
def heading(tmp_path_factory) -> Path:
    return drawn(tmp_path_factory.mktemp("heading") / "net.safetensors", load_config(HEADING, NARROW))


def test_predict_says_what_a_clip_shows(heading, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "in.mkv", torch.rand(7, 3, 40, 48) * 2 - 1, 5)
    out = tmp_path / "out.json"
    monkeypatch.setattr("vision_ssm.engine.video.classification.PIECE", 3)  # the state goes from piece to piece
    command = ["predict", HEADING, str(heading), str(tmp_path / "in.mkv"), str(out)]
    assert cli.main([*command, "--set", *NARROW]) == 0
    found = json.loads(out.read_text())
    config = load_config(HEADING, NARROW)
    video = read_video(tmp_path / "in.mkv", channels=1, size=(32, 32))
    wanted = load_task(config, heading)(video[None])[0].softmax(dim=0)
    assert_close(torch.tensor([*found["probabilities"].values()]), wanted, atol=1e-5, rtol=0)
    assert [*found["probabilities"]] == list(config.classes) and found["frames"] == 7
    assert found["class"] == config.classes[int(wanted.argmax())] and found["class"] in capsys.readouterr().out
    assert "--overwrite" in refused(capsys, *command, "--set", *NARROW)
    assert cli.main([*command, "--overwrite", "--set", *NARROW]) == 0


def test_bad_clips_have_no_class(heading, tmp_path, capsys):
    config, out = load_config(HEADING, NARROW), tmp_path / "new" / "out.json"
    out.parent.mkdir()

    def fails(source: Path, *more: object, weights: Path = heading, target: Path = out) -> str:
        line = refused(capsys, "predict", HEADING, weights, source, target, *more, "--set", *NARROW)
        with pytest.raises((ValueError, OSError)) as caught:
            classify_file(config, weights, source, target, console=QUIET)
        if not more:  # the command says what the function does
            assert " ".join(str(caught.value).split()) in line
        return line

    def array(pixels: np.ndarray) -> Path:
        np.save(tmp_path / "clip.npy", pixels)
        return tmp_path / "clip.npy"

    clip = np.zeros((2, 32, 32), np.uint8)
    assert "must end in .json" in fails(array(clip), target=out.with_suffix(".mp4"))
    assert "no such folder" in fails(array(clip), target=tmp_path / "absent" / "out.json")
    assert "video must be (clips, frames, 1, height, width)" in fails(array(clip[:, None].repeat(3, axis=1)))
    assert "as bytes or as numbers in [-1, 1]" in fails(array(clip[:0]))
    assert "no such video" in fails(tmp_path / "absent.mp4")
    (tmp_path / "empty.mp4").touch()
    assert "empty.mp4 is no video" in fails(tmp_path / "empty.mp4")
    assert "not finite" in fails(array(clip), weights=drawn(tmp_path / "inf.safetensors", config, torch.nan))
    line = refused(capsys, "predict", HEADING, heading, array(clip), out, "--frames", "3", "--set", *NARROW)
    assert "--frames is nothing for config video/moving_digits_heading" in line
    line = refused(capsys, "predict", HEADING, heading, array(clip), out, "--set", *NARROW, "model.net.dim=16")
    assert "another model" in line
    assert not [*out.parent.iterdir()]


# What the frames of a cine hold


def beat(frames: int = 6) -> np.ndarray:
    """A cine (24, 20, 2, t): a disc that shrinks, on noise."""
    x, y = np.mgrid[:24, :20] - 11
    discs = np.stack([x**2 + y**2 < (8 - t % 6) ** 2 for t in range(frames)], axis=-1)[:, :, None].repeat(2, axis=2)
    return 100.0 * discs + np.random.default_rng(0).normal(size=discs.shape)


def save_cine(path: Path, voxels: np.ndarray) -> Path:
    """On an oblique grid, 42.5 ms from frame to frame, the first 3 ms late."""
    affine = np.array([[-1.5, 0.1, 0.0, 9.0], [0.1, 1.4, 0.2, -7.0], [0.0, -0.2, 8.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
    image = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
    image.header["pixdim"][4] = 42.5
    image.header["toffset"] = 3
    image.header.set_xyzt_units("mm", "msec")
    image.set_sform(affine, code=1)
    nibabel.save(image, path)
    return path


@pytest.fixture
def acdc(tmp_path) -> Path:
    """Five patients in ACDC's layout; the first and the fourth frame have labels, 3 where the disc is."""
    for patient in (f"patient{number:03}" for number in range(1, 6)):
        folder = tmp_path / "acdc" / patient
        folder.mkdir(parents=True)
        save_cine(folder / f"{patient}_4d.nii.gz", beat())
        for frame in (1, 4):
            label = 3 * (beat()[..., frame - 1] > 50)
            affine = nibabel.load(folder / f"{patient}_4d.nii.gz").affine
            nibabel.save(
                nibabel.Nifti1Image(label.astype(np.uint8), affine), folder / f"{patient}_frame{frame:02}_gt.nii.gz"
            )
    return tmp_path / "acdc"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return drawn(tmp_path_factory.mktemp("cine") / "net.safetensors", load_config(CINE, SMALL))


def test_predict_labels_every_frame_on_the_grid_of_the_cine(weights, tmp_path, capsys):
    source, out = save_cine(tmp_path / "in.nii.gz", beat()), tmp_path / "out.nii.gz"
    command = ["predict", CINE, str(weights), str(source), str(out)]
    assert cli.main([*command, "--set", *SMALL]) == 0
    assert str(tmp_path / "out.csv") in capsys.readouterr().out
    image, found = nibabel.load(source), nibabel.load(out)
    for field in ("dim", "pixdim", "xyzt_units", "toffset", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
        assert_close(found.header[field], image.header[field], rtol=0, atol=0)
    assert np.array_equal(found.affine, image.affine) and found.get_data_dtype() == np.uint8
    labels = np.asarray(found.dataobj)
    with (tmp_path / "out.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 6 * 3 and {row["case"] for row in rows} == {"in"}
    millilitres = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    for row in rows:
        count = int((labels[..., int(row["frame"]) - 1] == int(row["label"])).sum())
        assert (int(row["voxels"]), float(row["millilitres"])) == (count, pytest.approx(count * millilitres, rel=1e-5))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "--overwrite" in refused(capsys, *command, "--set", *SMALL)


def test_the_largest_and_the_smallest_frame_of_each_class_are_named():
    labels = np.zeros((3, 3, 1, 3), np.uint8)
    for frame, (first, second) in enumerate([(2, 1), (1, 1), (3, 1)]):
        labels[0, :first, 0, frame], labels[1, :second, 0, frame] = 1, 2
    rows = by_frame("case", nibabel.Nifti1Image(labels, np.eye(4)), ("one", "two", "three"))
    assert [(row["frame"], row["class"], row["voxels"]) for row in rows[:3]] == [
        (1, "one", 2),
        (1, "two", 1),
        (1, "three", 0),
    ]
    named = [(row["class"], row["frame"], row["extreme"]) for row in rows if row["extreme"]]
    assert named == [("one", 2, "smallest"), ("one", 3, "largest")]


def test_frames_are_as_far_apart_as_in_training_and_slices_whole(weights, tmp_path):
    """Of 6 frames where a clip has 3, every other makes a clip; without a spacing, the network sees the file's."""
    config = load_config(CINE, [*SMALL, "test_dataloader.dataset.frames=3", "test_dataloader.dataset.spacing=None"])
    task = load_task(config, weights)
    path = save_cine(tmp_path / "in.nii", beat())
    found = CinePredictor(config, task)(path).argmax(axis=0)
    voxels = nibabel.load(path).get_fdata(dtype=np.float32)
    low, high = np.percentile(voxels, (1, 99))
    scaled = torch.from_numpy(np.clip((voxels - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32))
    for z in range(2):
        for first in (0, 1):
            film = scaled[:, :, z, first::2].permute(2, 0, 1)[None, :, None]
            classes = task.net(film)[0][0].argmax(dim=1).movedim(0, -1).numpy()
            assert (found[:, :, z, first::2] == classes).mean() > 0.999  # but for ties of rounding


class Bright(nn.Module):
    """Tells what is bright, as class 1, from what is dark; there is nothing else."""

    net = nn.Identity()

    def forward(self, film):
        return torch.cat([-film, film, *[film - 9] * 2], dim=2)


@pytest.mark.parametrize("spacing", [0.9, 1.5, 2.0])
def test_labels_lie_where_the_image_is(spacing, tmp_path):
    """At any spacing in between: a network that tells bright from dark finds what is bright, off its middle, too."""
    config = load_config(CINE, [*SMALL, f"test_dataloader.dataset.spacing={spacing}"])
    predictor = CinePredictor(config, Bright())
    bright = np.zeros((30, 26, 3, 4), bool)
    for z in range(3):
        for t in range(4):
            bright[4 + t : 14, 15 - 2 * z : 22, z, t] = True
    found = predictor(save_cine(tmp_path / "in.nii", 100.0 * bright)).argmax(axis=0) == 1
    for z in range(3):
        for t in range(4):
            both = 2 * (found & bright)[:, :, z, t].sum() / (found.sum((0, 1)) + bright.sum((0, 1)))[z, t]
            assert both > 0.9
            middle, wanted = (np.argwhere(m[:, :, z, t]).mean(axis=0) for m in (found, bright))
            assert np.abs(middle - wanted).max() < 0.25


@pytest.mark.parametrize("size", [(1, 1, 1, 3), (33, 7, 1, 1), (5, 40, 2, 25)], ids=str)
def test_cines_of_any_size_are_labelled(size, weights, tmp_path):
    config = load_config(CINE, SMALL)
    source = save_cine(tmp_path / "in.nii", np.random.default_rng(0).normal(size=size))
    assert CinePredictor(config, load_task(config, weights))(source).shape == (4, *size)


@torch.no_grad()
def test_flips_are_averaged(weights, tmp_path):
    """As a flipped file is labelled by itself and flipped back; along z nothing changes."""
    config = load_config(CINE, SMALL)
    task, voxels = load_task(config, weights), beat()
    plain = CinePredictor(config, task)
    flipped = np.flip(plain(save_cine(tmp_path / "flipped.nii", voxels[::-1])), axis=1)
    source = save_cine(tmp_path / "in.nii", voxels)
    wanted = (plain(source) + flipped) / 2
    for flips in ("x", "zx"):
        assert np.abs(CinePredictor(config, task, flips=flips)(source) - wanted).max() < 1e-5
    assert np.abs(plain(source) - wanted).max() > 1e-4
    assert len({CinePredictor(config, task, flips=flips).mark for flips in ("", "x", "y", "xy")}) == 4
    assert CinePredictor(config, task, flips="z").mark == plain.mark


def test_a_folder_of_cines_goes_on_and_a_bad_one_is_reported(acdc, weights, tmp_path, capsys):
    """Files and folders of patients; what was labelled is kept as it is, and one case that fails leaves the others."""
    cases, out = tmp_path / "cases", tmp_path / "out"
    shutil.copytree(acdc / "patient001", cases / "a")
    save_cine(cases / "b.nii.gz", beat())
    save_cine(cases / "c.nii", beat()[..., 0])
    save_cine(cases / "d.nii", beat())
    command = ["predict", CINE, str(weights), str(cases), str(out), "--probabilities", "--set", *SMALL]
    assert cli.main(command) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("vision-ssm: c failed: ") and "a cine has 4" in shown.err and shown.err.count("\n") == 1
    assert "3 labelled, 0 kept from before, 1 failed" in shown.out
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"volumes.csv"} | {
        part for name in "abd" for part in (f"{name}.nii.gz", f"overlays/{name}.png", f"probabilities/{name}.nii.gz")
    }
    chances, labels = (nibabel.load(out / place / "b.nii.gz") for place in ("probabilities", ""))
    assert chances.shape == (*labels.shape, 4) and chances.header["pixdim"][4] == labels.header["pixdim"][4] > 0
    assert np.array_equal(chances.get_fdata().argmax(-1), labels.get_fdata())
    assert_close(chances.get_fdata().sum(-1), np.ones(labels.shape), rtol=0, atol=1e-5)

    table = (out / "volumes.csv").read_text()
    stamp = (out / "a.nii.gz").stat().st_mtime_ns
    (out / "b.nii.gz").unlink()
    (out / "volumes.csv").unlink()
    (cases / "c.nii").unlink()
    assert cli.main(command) == 0
    assert "1 labelled, 2 kept from before, 0 failed" in capsys.readouterr().out
    assert (out / "volumes.csv").read_text() == table
    assert (out / "a.nii.gz").stat().st_mtime_ns == stamp
    assert "--overwrite" in refused(capsys, *command, "--flips", "x")
    (out / "volumes.csv").write_text("case,class,label,voxels,millilitres\n")
    assert "has the columns case, class, label" in refused(capsys, *command)


def test_eval_scores_the_frames_that_have_labels(acdc, weights, tmp_path, monkeypatch):
    """A network that were right everywhere has a Dice of 1 and no distance; each cine is labelled once."""
    calls = []

    def right(self, path):
        calls.append(path)
        voxels = nibabel.load(path).get_fdata()
        return np.stack([voxels <= 50, voxels < 0, voxels < 0, voxels > 50]).astype(np.float32)

    monkeypatch.setattr(CinePredictor, "__call__", right)
    out = tmp_path / "scores.json"
    assert cli.main(["eval", CINE, str(weights), "--out", str(out), "--set", *SMALL, f"data_root={acdc}"]) == 0
    found = json.loads(out.read_text())
    (name,) = {path.name.removesuffix("_4d.nii.gz") for path in calls}
    assert [row["case"] for row in found["cases"][::3]] == [f"{name}_4d frame 1", f"{name}_4d frame 4"]
    assert found["means"]["dice/left_ventricle"]["mean"] == 1
    assert found["means"]["hd95/left_ventricle"]["mean"] == 0
    assert out.with_suffix(".csv").is_file() and out.with_suffix(".png").is_file()


def test_eval_runs_the_network(acdc, weights, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["eval", CINE, str(weights), "--set", *SMALL, f"data_root={acdc}"]) == 0
    shown = capsys.readouterr().out
    assert "dice/left_ventricle" in shown and "hd95/myocardium" in shown


def test_eval_scores_folders_of_cines(acdc, tmp_path, capsys):
    """One file of all frames, and one for each of two; what is off by a voxel in one frame is not right there."""
    right = (3 * (beat() > 50)).astype(np.uint8)
    labels, truth, images = (tmp_path / name for name in ("labels", "truth", "images"))
    for folder in (labels, truth, images):
        folder.mkdir()
    save_cine(labels / "a.nii.gz", right)
    save_cine(truth / "a.nii.gz", right)
    shutil.copy(acdc / "patient001" / "patient001_4d.nii.gz", images)
    save_cine(images / "a.nii", beat())
    for path in (acdc / "patient001").glob("*_gt.nii.gz"):
        shutil.copy(path, truth)
    off = right.copy()
    off[..., 3] = np.roll(off[..., 3], 1, axis=0)
    save_cine(labels / "patient001.nii.gz", off)
    out, folders = tmp_path / "scores.json", ["--labels", labels, "--truth", truth, "--images", images]
    command = ["eval", CINE, *map(str, folders), "--out", str(out), "--set", *SMALL]
    assert cli.main(command) == 0
    rows = [row for row in json.loads(out.read_text())["cases"] if row["class"] == "left_ventricle"]
    names = [*(f"a frame {number}" for number in range(1, 7)), "patient001 frame 1", "patient001 frame 4"]
    assert [row["case"] for row in rows] == names
    assert [row["dice"] == 1 for row in rows] == [True] * 7 + [False] and rows[-1]["dice"] > 0.8
    assert out.with_suffix(".png").is_file()

    (truth / "patient001_frame04_gt.nii.gz").rename(truth / "patient001_frame09.nii.gz")
    assert "has 6 frames, and there are labels of frame 9" in refused(capsys, *command)
    shutil.copy(truth / "patient001_frame09.nii.gz", truth / "patient001_frame09_gt.nii")
    assert "are of one frame, 9; leave one of them" in refused(capsys, *command)
    save_cine(labels / "a.nii.gz", right[..., 0])
    (truth / "patient001_frame09_gt.nii").unlink()
    assert "a.nii.gz has 3 dimensions" in refused(capsys, *command)
    (labels / "a.nii.gz").unlink()
    assert "has no file for 1 of 2 cases" in refused(capsys, *command)
    assert "has no labels; give it classes" in refused(capsys, *command, "test_dataloader.dataset.classes=None")


def test_bad_cines_are_one_line_and_leave_nothing(acdc, weights, tmp_path, capsys):
    out = tmp_path / "new" / "out.nii.gz"
    out.parent.mkdir()
    good = save_cine(tmp_path / "in.nii", beat())

    def fails(source: Path, *more: str, target: Path = out, weights: Path = weights) -> str:
        return refused(capsys, "predict", CINE, weights, source, target, "--set", *SMALL, *more)

    def cine(voxels: np.ndarray) -> Path:
        return save_cine(tmp_path / "bad.nii", voxels)

    assert "must end in .nii or .nii.gz" in fails(good, target=out.with_suffix(".png"))
    assert "axes x, y and z" in refused(capsys, "predict", CINE, weights, good, out, "--flips", "t", "--set", *SMALL)
    assert "no such folder" in fails(good, target=tmp_path / "absent" / "out.nii")
    assert "is the input itself" in fails(good, target=good)
    assert "has 3 dimensions (24, 20, 2); a cine has 4" in fails(cine(beat()[..., 0]))
    assert "has no contrast" in fails(cine(np.ones((4, 4, 1, 3))))
    assert "NaN or infinite" in fails(cine(np.full((4, 4, 1, 3), np.nan)))
    assert "no such volume" in fails(tmp_path / "absent.nii")
    assert "holds 4 cases; give a folder" in fails(tmp_path)
    good.write_bytes(good.read_bytes()[:-100])
    assert "in.nii is truncated or damaged" in fails(good)
    assert "another model" in fails(good, "model.net.mixer=identity")
    nan = drawn(tmp_path / "nan.safetensors", load_config(CINE, SMALL), torch.nan)
    assert "not finite" in fails(cine(beat()), weights=nan)
    assert not [*out.parent.iterdir()]

    def unscored(*more: str) -> str:
        return refused(capsys, "eval", CINE, weights, "--set", *SMALL, f"data_root={acdc}", *more)

    assert "has no labels" in unscored("test_dataloader.dataset.classes=None")
    for frame in acdc.glob("*/*_frame04_gt.nii.gz"):
        frame.rename(frame.with_name(frame.name.replace("04", "09")))
    assert "has 6 frames, and there are labels of frame 9; remove them" in unscored()
    config = load_config(CINE, SMALL)
    task = load_task(config, weights)
    config.test_dataloader.dataset = {"type": Draws}
    with pytest.raises(ValueError, match="must test on CineSlices"):
        CinePredictor(config, task)
