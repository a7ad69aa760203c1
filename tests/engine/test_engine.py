"""Runs that stop and go on, checkpoints that are whole or absent, metrics, and predictions on the input's grid."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.engine import checkpoint as checkpoints
from vision_ssm.engine.checkpoint import (
    find_checkpoint,
    load_into,
    read_state,
    save_weights,
    write_atomically,
    write_json,
)
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.metrics import HD95, Accuracy, Dice
from vision_ssm.engine.segmentation.predict import predict_file
from vision_ssm.engine.segmentation.predictor import Predictor
from vision_ssm.engine.training.build import build_runner, prepare_folder
from vision_ssm.engine.training.evaluate import evaluate, load_task
from vision_ssm.engine.training.train import train

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "fixtures" / "tiny_unet.py")
QUIET = Console(quiet=True)


def tiny(*overrides: str):
    return load_config(TINY, overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny(), folder / "run", console=QUIET)
    return folder / "run"


def test_a_run_leaves_weights_metrics_and_checkpoints(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["steps"] == len(metrics["losses"]) == 4
    assert set(metrics["scores"]) >= {"dice/mean", "hd95/mean", "dice/pallidum"}
    assert find_checkpoint(trained, "latest").name == "iter_4.pth"
    assert not list(trained.glob(".partial*"))
    with safe_open(trained / "weights.safetensors", framework="pt") as weights:
        metadata = weights.metadata()
    assert metadata["config"] == "tiny_unet"
    assert json.loads(metadata["classes"])[4] == "pallidum"
    assert metadata["input_channels"] == "3"


def test_checkpoints_need_no_allow_list(trained):
    known = list(torch.serialization.get_safe_globals())
    content = torch.load(find_checkpoint(trained, "latest"), weights_only=True)
    assert torch.serialization.get_safe_globals() == known
    assert {"state_dict", "optimizer", "param_schedulers", "message_hub", "random_states"} <= content.keys()


def test_a_second_run_refuses_the_folder(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(FileExistsError, match=r"holds an earlier run; continue it with --resume or choose another"):
        build_runner(tiny(), trained)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume; start without --resume"):
        build_runner(tiny(), tmp_path, resume="latest")


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PermissionError, match=r"cannot write to .*choose another folder"):
        prepare_folder(tmp_path / "file" / "run")


def test_a_write_that_fails_keeps_what_was_there(tmp_path):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError("disk full")

    target = tmp_path / "file"
    write_atomically(target, lambda partial: partial.write_text("whole"))
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "whole"


@pytest.mark.parametrize("name", ["iter_4.pth", "weights.safetensors"])
def test_a_truncated_checkpoint_is_refused(trained, tmp_path, name):
    cut = tmp_path / name
    cut.write_bytes((trained / name).read_bytes()[:-5000])
    with pytest.raises(ValueError, match="truncated"):
        load_task(tiny(), cut)


@pytest.mark.parametrize("name", ["iter_4.pth", "weights.safetensors"])
def test_the_checkpoint_of_another_model_is_refused(trained, name):
    with pytest.raises(ValueError, match=r"weights of another model: .*missing \(e\.g\..*Use the config"):
        load_task(tiny("model.net.backbone=test_convnext"), trained / name)


def test_weights_of_another_shape_change_nothing():
    net, other = nn.Linear(2, 3), nn.Linear(2, 4)
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="2 of another shape"):
        load_into(net, other.state_dict(), Path("other"))
    assert_close(net.weight, before)


def test_resuming_with_another_model_is_refused(trained):
    with pytest.raises(ValueError, match="weights of another model"):
        build_runner(tiny("model.net.backbone=test_convnext"), trained, resume="latest").train()


def test_other_files_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_state(tmp_path / "absent.pth")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="has no state_dict"):
        read_state(tmp_path / "other.pth")


def test_weights_and_checkpoint_are_the_same_network(trained):
    published, kept = read_state(trained / "weights.safetensors"), read_state(trained / "iter_4.pth")
    assert published.keys() == kept.keys()
    assert all(torch.equal(published[key], kept[key]) for key in kept)


def test_the_scores_of_a_run_are_those_of_its_weights(trained):
    scores = json.loads((trained / "metrics.json").read_text())["scores"]
    again = evaluate(tiny(), load_task(tiny(), trained / "weights.safetensors"))
    assert again["dice/mean"] == pytest.approx(scores["dice/mean"], abs=1e-6)


def test_saved_weights_can_be_read_by_others(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, nn.Linear(2, 2), config="c", classes=("a",), channels=1)
    assert path.stat().st_mode == (tmp_path / "weights.safetensors").stat().st_mode
    assert checkpoints.read_state(path).keys() == {"weight", "bias"}


def test_bfloat16_autocast_trains_on_a_cpu(tmp_path):
    config = tiny("train_cfg.max_iters=1", "optim_wrapper.type=vision_ssm.engine.training.runner.AutocastOptimWrapper")
    seen = []
    runner = build_runner(config, tmp_path)
    runner.model.net.heads[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    runner.train()
    assert torch.bfloat16 in seen
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())


def scored(metric, prediction, label):
    metric.process({}, [{"prediction": prediction, "label": label}])
    return metric.compute_metrics(metric.results)


def test_dice_and_distance_of_two_cubes():
    label = torch.zeros(1, 12, 12, 12)
    label[:, 2:6, 2:6, 2:6] = 1
    moved = label.roll(2, dims=1)
    assert scored(Dice(["cube"]), moved, label) == {"cube": 0.5, "mean": 0.5}
    assert scored(HD95(["cube"]), moved, label)["cube"] == 2
    assert scored(HD95(["cube"], spacing=(3.0, 1.0, 1.0)), moved, label)["cube"] == 6
    assert scored(HD95(["cube"]), torch.zeros_like(label), label)["cube"] == float("inf")
    assert scored(Dice(["cube", "absent"]), label, label)["mean"] == 1


def test_accuracy_counts_right_images():
    metric = Accuracy()
    samples = [{"prediction": torch.tensor(p), "label": torch.tensor(t)} for p, t in ((1, 1), (2, 1), (3, 3), (0, 0))]
    metric.process({}, samples)
    assert metric.compute_metrics(metric.results) == {"top1": 0.75}


def test_numbers_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "n.json", {"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads((tmp_path / "n.json").read_text()) == {"a": None, "b": [None, 1.5]}


def test_a_label_map_lies_on_the_grid_of_its_volume(trained, tmp_path):
    source = Path(deep_grey_files()[0]["image"])
    brain = nibabel.load(source)
    task = load_task(tiny(), trained / "weights.safetensors")
    written = predict_file(Predictor(tiny(), task), source, tmp_path / "labels.nii.gz")
    labels = nibabel.load(tmp_path / "labels.nii.gz")
    assert labels.shape == brain.shape
    assert np.allclose(labels.affine, brain.affine)
    assert labels.get_data_dtype() == np.uint8
    assert written.overlay.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.nii.gz", "labels.png", "labels.csv"}


def test_a_volume_stored_in_another_order_gets_the_same_labels(trained, tmp_path):
    source = Path(deep_grey_files()[0]["image"])
    task = load_task(tiny(), trained / "weights.safetensors")
    brain = nibabel.load(source)
    reordered = brain.as_reoriented(
        nibabel.orientations.axcodes2ornt(("S", "L", "P"), (("L", "R"), ("P", "A"), ("I", "S")))
    )
    nibabel.save(reordered, tmp_path / "reordered.nii.gz")
    predictor = Predictor(tiny(), task)
    plain, turned = (predictor([path]).argmax(0).astype(np.uint8) for path in (source, tmp_path / "reordered.nii.gz"))
    assert turned.shape == reordered.shape
    back = nibabel.as_closest_canonical(nibabel.Nifti1Image(turned, reordered.affine))
    assert (np.asarray(back.dataobj) == plain).mean() > 0.999


def test_outputs_are_not_overwritten_in_silence(trained, tmp_path):
    task = load_task(tiny(), trained / "weights.safetensors")
    source, target = Path(deep_grey_files()[0]["image"]), tmp_path / "labels.nii"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict_file(Predictor(tiny(), task), source, target)
    assert target.read_text() == "precious"
    predict_file(Predictor(tiny(), task), source, target, overwrite=True)
    assert nibabel.load(target).shape == (96, 96, 64)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [("labels.png", ValueError, "must end in"), ("absent/labels.nii", FileNotFoundError, "no such folder")],
)
def test_bad_output_names_are_refused(tmp_path, target, error, message):
    predictor = Predictor(tiny(), build(tiny().model))
    with pytest.raises(error, match=message):
        predict_file(predictor, Path(deep_grey_files()[0]["image"]), tmp_path / target)


def test_prediction_needs_a_config_that_segments():
    with pytest.raises(ValueError, match="does not segment volumes"):
        Predictor(load_config("image/mnist_vmamba_nano"), nn.Identity())
