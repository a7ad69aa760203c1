"""Next-frame models from config to video: what is trained and measured, and the commands on clips end to end."""

import csv
import errno
import io
import json
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.linalg import sqrtm
from torch.testing import assert_close
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.models import AlexNet_Weights, alexnet

from vision_ssm.data.video_files import read_video
from vision_ssm.engine.checkpoint import save_weights
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.training.build import spanning
from vision_ssm.engine.training.evaluate import evaluate, load_task
from vision_ssm.engine.video.continuation import continue_file
from vision_ssm.engine.video.encoding import write_video
from vision_ssm.engine.video.next_frame import FramePrediction, mse, psnr, ssim
from vision_ssm.engine.video.perceptual import ClipFeatures, NotMeasured, frechet_distance, lpips
from vision_ssm.engine.video.rollouts import measure_rollouts
from vision_ssm.engine.video.sheet import chosen, contact_sheet
from vision_ssm.tools import __main__ as cli
from vision_ssm.video import MODELS, NextFrame, convs5_stack, pixel_loss

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "fixtures" / "tiny_video.py")
PUBLISHED = {
    "video/moving_digits_convs5_300": "convs5_moving_mnist_300",
    "video/moving_digits_convs5_600": "convs5_moving_mnist_600",
    "video/moving_digits_conv_lstm_300": "conv_lstm_moving_mnist",
    "video/moving_digits_transformer_300": "transformer_moving_mnist",
}
LOADERS = ("train_dataloader.dataset.dataset", "val_dataloader.dataset", "test_dataloader.dataset")
CPU = torch.device("cpu")


def refused(capsys, *arguments: object) -> str:
    """The one line that a failing command writes."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vision-ssm: error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the weights of two steps."""
    folder = tmp_path_factory.mktemp("video") / "run"
    assert cli.main(["train", TINY, "--work-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def weights(run) -> Path:
    return run / "weights.safetensors"


@pytest.fixture
def clip(tmp_path) -> Path:
    """Seven grey frames of 16 x 16 pixels, as bytes."""
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).integers(256, size=(7, 16, 16), dtype=np.uint8))
    return tmp_path / "clip.npy"


def small(actions: int = 1) -> FramePrediction:
    stack = convs5_stack(4, state=4, layers=1, groups=2)
    return FramePrediction(NextFrame(stack, dim=4, encoder=(32,), decoder=(32,), actions=actions), context=2)


# What is trained


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_hold_the_published_models(name):
    with torch.device("meta"):
        mine, published = build(load_config(name).model.net), MODELS[PUBLISHED[name]]()
    shapes = [{key: m.shape for key, m in net.state_dict().items()} for net in (mine, published)]
    assert shapes[0] == shapes[1]


def test_the_published_recipe():
    for name, rate, frames in (("300", 1e-3, 300), ("600", 5e-4, 600)):
        config = load_config(f"video/moving_digits_convs5_{name}")
        optimizer = config.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (rate, (0.9, 0.95), 1e-5)
        assert config.train_dataloader.dataset.dataset.frames == frames
        assert (config.train_dataloader.batch_size, config.train_cfg.max_iters) == (8, 300_000)
        warm_up, cosine = spanning(config.param_scheduler, config.train_cfg)
        assert (warm_up["end"], cosine["begin"], cosine["end"]) == (5_000, 5_000, 300_000)


def test_a_run_that_ends_before_its_schedule_begins_is_refused(tmp_path, capsys):
    command = ["train", TINY, "--work-dir", tmp_path / "run", "--set", "train_cfg.max_iters=1"]
    assert "param_scheduler.1 begins at step 1, the run has 1" in refused(capsys, *command)


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_clips_that_end_with_the_context_are_refused_before_training(loader, tmp_path, capsys):
    command = ["train", TINY, "--work-dir", tmp_path / "run", "--set", f"{loader}.dataset.frames=3"]
    assert "the clip has 3 frames, the context is 3: none is left to predict" in refused(capsys, *command)
    assert not [*(tmp_path / "run").iterdir()]


def test_what_takes_long_shows_how_far_it_is(weights, clip, tmp_path):
    config = load_config(TINY)
    for title, work in (
        ("testing", partial(evaluate, config, load_task(config, weights))),
        ("generating", partial(measure_rollouts, config, weights)),
        ("generating", partial(continue_file, config, weights, clip, tmp_path / "out.mkv", frames=3)),
    ):
        console = Console(file=io.StringIO(), force_terminal=True)
        work(console=console)
        assert re.search(rf"{title} .*100%", console.file.getvalue())


def test_a_folder_of_videos_trains(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "videos" / part).mkdir(parents=True)
        write_video(tmp_path / "videos" / part / "noise.mkv", torch.rand(6, 3, 18, 24) * 2 - 1, 5)
    tiny = {
        "data_root": tmp_path / "videos",
        "model.context": 2,
        "model.net.dim": 32,
        "model.net.encoder": (32, 32),
        "model.net.decoder": (32, 32),
        "model.net.stack.dim": 32,
        "model.net.stack.layers": 1,
        "train_dataloader.batch_size": 1,
        "train_dataloader.num_workers": 0,
        "train_dataloader.dataset.dataset.frames": 3,
        **{f"{loader}.size": (16, 16) for loader in LOADERS},
        **{f"{loader}.frames": 4 for loader in LOADERS[1:]},
        "param_scheduler.0.end": 1,
        "param_scheduler.1.begin": 1,
        "train_cfg.max_iters": 2,
        "optim_wrapper.type": "mmengine.optim.OptimWrapper",
    }
    changes = [f"{key}={value}" for key, value in tiny.items()]
    assert cli.main(["train", "video/folder_convs5", "--work-dir", str(tmp_path / "run"), "--set", *changes]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2


def test_the_loss_is_of_every_next_frame_by_those_before():
    task = small(actions=3)
    video, actions = torch.rand(2, 5, 1, 4, 4) * 2 - 1, torch.randint(3, (2, 5))
    prediction, _ = task.net(video[:, :-1], actions[:, 1:])
    assert_close(task(video, actions, mode="loss")["loss"], pixel_loss(prediction, video[:, 1:]))
    assert_close(task(video, actions), prediction)
    with pytest.raises(ValueError, match="clips of one frame have none that follows"):
        task(video[:, :1], mode="loss")


def test_predictions_follow_the_context_alone():
    task = small(actions=3)
    video, actions = torch.rand(2, 6, 1, 4, 4) * 2 - 1, torch.randint(3, (2, 6))
    found = task(video, actions, mode="predict")
    frames, _ = task.net.generate(video[:, :2], 4, actions=actions)
    assert_close(torch.stack([one["prediction"] for one in found]), frames)
    assert_close(torch.stack([one["truth"] for one in found]), video[:, 2:])
    with pytest.raises(ValueError, match="the clip has 2 frames, the context is 2: none is left"):
        task.rollout(video[:, :2])
    with pytest.raises(ValueError, match="context must be at least 1"):
        FramePrediction(task.net, context=0)


# What is measured


def test_qualities_agree_with_another_library():
    prediction, truth = torch.rand(2, 3, 3, 24, 20)
    assert_close(mse(prediction, truth)[1], torch.nn.functional.mse_loss(prediction[1], truth[1]))
    theirs = peak_signal_noise_ratio(prediction, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert_close(psnr(prediction, truth), theirs)
    similar = truth + 0.1 * prediction
    _, padded = structural_similarity_index_measure(
        similar, truth, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    assert_close(ssim(similar, truth), padded[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert psnr(truth, truth).isinf().all()
    with pytest.raises(ValueError, match=r"11 x 11 pixels or more; got \(10, 20\)"):
        ssim(truth[..., :10, :], truth[..., :10, :])


def test_the_evaluator_gives_chosen_frames_beside_the_mean(weights):
    config = load_config(TINY)
    for metric in config.test_evaluator:
        metric["frames"] = (1, 4)
    scores = evaluate(config, load_task(config, weights))
    assert [*scores] == [f"{name}/{key}" for name in ("mse", "psnr", "ssim") for key in ("mean", "1", "4")]
    config.test_evaluator[0]["frames"] = (5,)
    with pytest.raises(ValueError, match="frame 5 after the context is to be measured, but clips have 4 there"):
        evaluate(config, load_task(config, weights))


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    x, y = (
        torch.randn(40, 5, dtype=torch.float64),
        2 + torch.randn(30, 5, dtype=torch.float64) @ torch.randn(5, 5).double(),
    )
    covariances = [m.T.cov().numpy() for m in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    wanted = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(wanted)
    assert frechet_distance(x[:3], x[:3]) == pytest.approx(0, abs=1e-9)  # fewer clips than features
    with pytest.raises(ValueError, match="two clips on each side; got 1 and 3"):
        frechet_distance(x[:1], x[:3])


def scripted(path: Path, net: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(net).save(path)
    return path


class Brightness(torch.nn.Module):
    """Mean and spread of a clip, for features."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return torch.stack([clips.mean(dim=(1, 2, 3, 4)), clips.std(dim=(1, 2, 3, 4))], dim=1)


def test_features_are_of_large_coloured_clips(tmp_path):
    features = ClipFeatures(scripted(tmp_path / "net.pt", Brightness()), CPU)
    clips = torch.rand(2, 3, 1, 8, 8)
    found = features(clips)
    assert found.dtype == torch.float64 and found.shape == (2, 2)
    assert_close(found[:, 0].float(), clips.mean(dim=(1, 2, 3, 4)), rtol=0.02, atol=0.02)
    flat = ClipFeatures(scripted(tmp_path / "flat.pt", torch.nn.Flatten(0)), CPU)
    with pytest.raises(ValueError, match="must give features"):
        flat(clips)
    with pytest.raises(ValueError, match="grey or RGB frames; these have 2 channels"):
        features(clips.expand(-1, -1, 2, -1, -1))


def test_lpips_is_measured_where_its_weights_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NotMeasured, match=r"needs AlexNet's ImageNet weights of torchvision in .*alexnet-"):
        lpips(CPU)
    place = tmp_path / "hub" / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
    place.parent.mkdir(parents=True)
    torch.save(alexnet().state_dict(), place)  # stand for the weights, which no test downloads
    distance = lpips(CPU)
    truth = torch.rand(2, 1, 32, 32)
    assert_close(distance(truth, truth), torch.zeros(2))
    assert (distance(truth, 1 - truth) > 0).all()


def test_eval_writes_numbers_table_and_curves(weights, tmp_path, capsys):
    out = tmp_path / "rollouts.json"
    features = scripted(tmp_path / "net.pt", Brightness())
    assert cli.main(["eval", TINY, str(weights), "--out", str(out), "--features", str(features)]) == 0
    shown = capsys.readouterr().out
    assert "SSIM" in shown and "LPIPS                   not measured: needs frames of 32 x 32" in shown
    found = json.loads(out.read_text())
    assert (found["context"], found["frames"], found["clips"]) == (3, 4, 3)
    assert [*found["means"]] == ["mse", "psnr", "ssim", "fvd"] and [*found["not_measured"]] == ["lpips"]
    config = load_config(TINY)
    scores = evaluate(config, load_task(config, weights))
    for name in ("mse", "psnr", "ssim"):
        assert found["means"][name] == pytest.approx(scores[f"{name}/mean"], rel=1e-4)
        assert np.mean(found["per_frame"][name]) == pytest.approx(found["means"][name])
    with out.with_suffix(".csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["frame"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["ssim"]) for row in rows] == found["per_frame"]["ssim"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_eval_says_what_it_cannot_do(weights, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no network")
    command = ["eval", TINY, weights, "--out", tmp_path / "out.json"]
    assert "no such feature extractor" in refused(capsys, *command, "--features", tmp_path / "absent.pt")
    assert "is no TorchScript file" in refused(capsys, *command, "--features", tmp_path / "text.pt")
    assert "none is left to predict" in refused(capsys, *command, "--set", "model.context=7")
    assert "--tolerance is nothing for config tiny_video" in refused(capsys, *command, "--tolerance", "2")
    assert "this command serves Segmentation" in refused(capsys, "eval", TINY, "--labels", "a", "--truth", "b")
    assert not [*tmp_path.glob("out.*")]


# What is generated


def test_predict_goes_on_with_a_clip(weights, clip, tmp_path, capsys):
    target = tmp_path / "out.mkv"
    command = ["predict", TINY, str(weights), str(clip), str(target)]
    assert cli.main(command) == 0
    assert str(tmp_path / "out.png") in capsys.readouterr().out
    config = load_config(TINY)
    context = torch.from_numpy(np.load(clip)[None, :3, None]).float() / 127.5 - 1
    wanted, _ = load_task(config, weights).net.generate(context, 4)
    assert_close(read_video(target, channels=1), wanted[0], atol=1 / 255, rtol=0)  # written without loss, but in bytes
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    assert "--overwrite" in refused(capsys, *command)
    assert cli.main([*command, "--overwrite", "--frames", "12", "--fps", "25"]) == 0  # beyond the truth
    assert len(read_video(target, channels=1)) == 12


def test_predict_reads_a_video(weights, tmp_path):
    """Frames are resized as the config says; the file may be longer than what is used of it."""
    write_video(tmp_path / "in.mkv", torch.rand(9, 3, 24, 32) * 2 - 1, 5)
    assert (
        cli.main(["predict", TINY, str(weights), str(tmp_path / "in.mkv"), str(tmp_path / "out.gif"), "--frames", "2"])
        == 0
    )
    assert read_video(tmp_path / "out.gif", channels=1).shape == (2, 1, 16, 16)


def test_predict_takes_actions(clip, tmp_path, capsys):
    config = load_config(TINY, ["model.net.actions=3"])
    net = build(config.model.net)
    save_weights(tmp_path / "net.safetensors", net, config="tiny", classes=(), channels=1)
    np.save(tmp_path / "actions.npy", np.array([0, 1, 2, 0, 1, 2, 2]))
    command = [
        "predict",
        TINY,
        tmp_path / "net.safetensors",
        clip,
        tmp_path / "out.mkv",
        "--set",
        "model.net.actions=3",
    ]
    assert cli.main([*map(str, command), "--actions", str(tmp_path / "actions.npy")]) == 0
    first = (tmp_path / "out.mkv").read_bytes()
    assert cli.main([*map(str, command), "--overwrite"]) == 0
    assert (tmp_path / "out.mkv").read_bytes() != first

    again = [*command, "--overwrite", "--actions", tmp_path / "actions.npy"]
    np.save(tmp_path / "actions.npy", np.full(7, 2**64 - 1, np.uint64))  # which is -1 in 64 bits
    assert "an integer, int64 or narrower" in refused(capsys, *again)
    np.save(tmp_path / "actions.npy", np.array([0, 1, 2, 0, 1, 2, 3]))
    assert "actions go from 0 to 2, or -1 for unknown; got 0 to 3" in refused(capsys, *again)
    np.save(tmp_path / "actions.npy", np.array([0, 1, 2, 0]))
    assert "for each of 7 frames, context included; it has int64 (4,)" in refused(capsys, *again)


def test_bad_clips_are_one_line_and_leave_nothing(weights, clip, tmp_path, capsys):
    out = tmp_path / "new" / "out.mp4"

    def fails(source: Path, *more: object, target: Path = out) -> str:
        return refused(capsys, "predict", TINY, weights, source, target, *more)

    def array(pixels: np.ndarray) -> Path:
        np.save(tmp_path / "other.npy", pixels)
        return tmp_path / "other.npy"

    assert "no such folder" in fails(clip)
    out.parent.mkdir()
    assert "must be a video that ends in .mp4" in fails(clip, target=out.with_suffix(".nii"))
    assert "no such file" in fails(tmp_path / "absent.npy")
    assert "no such video" in fails(tmp_path / "absent.mp4")
    assert "is a folder; give one clip at a time" in fails(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    assert "text.mp4 is no video" in fails(tmp_path / "text.mp4")
    write_video(tmp_path / "short.mkv", torch.zeros(1, 1, 16, 16), 5)
    assert "has 1 frames, the context of tiny_video is 3" in fails(tmp_path / "short.mkv")
    for size in (0, 16, "wide", (16, 0), (16, 16, 16), (8.5, 16)):
        assert "must state frame_size" in fails(tmp_path / "short.mkv", "--set", f"frame_size={size}")
    (tmp_path / "text.npy").write_text("no array")
    assert "truncated or no array" in fails(tmp_path / "text.npy")
    whole = clip.read_bytes()
    for damaged in (
        b"",
        whole[:7],
        whole[:40],
        whole[:-1],
        b"PK\x03\x04" + whole,
        whole[:10] + b"{'descr': (" + whole[21:],
    ):
        (tmp_path / "text.npy").write_bytes(damaged)
        assert "text.npy is truncated or no array" in fails(tmp_path / "text.npy")
    assert "has 2 frames, the context of tiny_video is 3" in fails(array(np.zeros((2, 16, 16), np.uint8)))
    assert "give --frames N" in fails(array(np.zeros((3, 16, 16), np.uint8)))
    assert "frames must be (clips, frames, 1, height, width)" in fails(array(np.zeros((5, 3, 16, 16), np.uint8)))
    assert "multiples of 2; got (15, 16)" in fails(array(np.zeros((5, 15, 16), np.uint8)))
    assert "as bytes or as numbers in [-1, 1]; it has int64 (5, 16, 16)" in fails(array(np.zeros((5, 16, 16), int)))
    assert "must have values in [-1, 1]" in fails(array(np.full((5, 16, 16), np.nan)))
    late = np.zeros((5, 16, 16))
    late[-1] = 2  # a true frame, which only the sheet shows
    assert "must have values in [-1, 1]" in fails(array(late))
    assert "--flips is nothing for config tiny_video" in fails(clip, "--flips", "xy")
    assert "another model" in fails(clip, "--set", "model.net.stack.layers=2")
    for fps in ("0", "nan", "1e-9"):
        assert "frames per second" in fails(clip, "--fps", fps)
    out.mkdir()
    assert "out.mp4 is a folder; choose another name" in fails(clip, "--overwrite")
    out.rmdir()
    for context in ("0", "1.5", "few"):
        assert "context must be at least 1 frame" in fails(clip, "--set", f"model.context={context}")
    assert "7 frames, the context of tiny_video is 8" in fails(clip, "--set", "model.context=8")
    for frames in ("0", "-1"):
        assert "give --frames N" in fails(clip, "--frames", frames)
    assert not [*out.parent.iterdir()]


def test_a_folder_that_takes_no_files_is_found_out_first(clip, tmp_path, capsys, monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("vision_ssm.engine.checkpoint.tempfile.TemporaryFile", read_only)
    error = refused(capsys, "predict", TINY, tmp_path / "absent.safetensors", clip, tmp_path / "out.mp4")
    assert f"cannot write to {tmp_path} (Read-only file system); choose another folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["clip.npy"]


def test_a_video_whose_size_changes_is_refused(weights, tmp_path, capsys):
    """Beyond the context, too, where a frame would only be shown."""
    parts = []
    for size, frames in ((16, 4), (32, 4)):
        with av.open(tmp_path / "part", "w", format="h264") as container:
            stream = container.add_stream("h264", 10)
            stream.height, stream.width = size, size
            for _ in range(frames):
                picture = av.VideoFrame.from_ndarray(np.zeros((size, size), np.uint8), format="gray")
                container.mux(stream.encode(picture.reformat(format="yuv420p")))
            container.mux(stream.encode())
        parts.append((tmp_path / "part").read_bytes())
    (tmp_path / "in.mp4").write_bytes(b"".join(parts))
    error = refused(capsys, "predict", TINY, weights, tmp_path / "in.mp4", tmp_path / "out.mp4")
    assert "different sizes: (16, 16) and, from frame 4, (32, 32)" in error
    assert not [*tmp_path.glob("*out*")]


def test_frames_that_are_not_finite_are_not_written(weights, clip, tmp_path, capsys):
    config = load_config(TINY)
    task = load_task(config, weights)
    with torch.no_grad():
        task.net.join.bias.fill_(torch.nan)
    save_weights(tmp_path / "nan.safetensors", task.net, config="tiny", classes=(), channels=1)
    assert "frame 0 holds" in refused(capsys, "predict", TINY, tmp_path / "nan.safetensors", clip, tmp_path / "out.mp4")
    assert not [*tmp_path.glob("*out*")]


KILLED = """
import os, signal, sys
from vision_ssm.engine.video import encoding
from vision_ssm.tools.__main__ import main

to_bytes = encoding.to_bytes

def dies(frame, shape, number):
    if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_bytes(frame, shape, number)

encoding.to_bytes = dies
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_video_nothing_has_its_name(weights, clip, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    command = ["predict", TINY, str(weights), str(clip), str(folder / "out.mkv"), "--frames", "50"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in folder.iterdir()] == [".partial-out.mkv"]
    assert cli.main(command) == 0  # without --overwrite
    assert sorted(path.name for path in folder.iterdir()) == ["out.mkv", "out.png"]
    assert len(read_video(folder / "out.mkv", channels=1)) == 50


def test_an_interrupted_video_leaves_the_one_before(weights, clip, tmp_path, monkeypatch):
    target = tmp_path / "out.mkv"
    command = ["predict", TINY, str(weights), str(clip), str(target)]
    assert cli.main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vision_ssm.engine.video.encoding.to_bytes", interrupted)
    assert cli.main([*command, "--overwrite"]) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_tasks_are_named(weights, clip, tmp_path, capsys):
    digits = refused(capsys, "predict", "image/mnist_vmamba_nano", weights, clip, tmp_path / "out.mp4")
    assert "has the task Classification, this command serves FramePrediction, " in digits


def test_a_sheet_has_a_picture_for_each_frame_and_a_gap_where_there_is_none():
    assert chosen(3) == [0, 1, 2] and chosen(100) == [round(place * 11) for place in range(10)]
    frames = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 6, 8)
    figure = contact_sheet({"truth": {5: frames[0], 7: None, 9: frames[3]}, "prediction": {5: frames[1], 7: frames[2]}})
    grid = np.array(figure.axes).reshape(2, 3)
    values = [[float(axes.images[0].get_array().mean()) if axes.images else None for axes in line] for line in grid]
    assert values == [[0, None, 1], [pytest.approx(1 / 3), pytest.approx(2 / 3), None]]
    assert [[axes.get_title() for axes in line] for line in grid] == [["5", "7", "9"], ["5", "7", ""]]
    assert [line[0].get_ylabel() for line in grid] == ["truth", "prediction"]
