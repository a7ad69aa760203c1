"""Next-frame models under one budget: a comparison is made, goes on, and is rendered as a table and as curves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vision_ssm.engine.benchmark.rows import Environment
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.experiment.comparison import compare, render
from vision_ssm.engine.experiment.runs import Run, network_of, read_runs
from vision_ssm.engine.video.next_frame import FrameMSE
from vision_ssm.tools.__main__ import main as vision_ssm

TINY = str(Path(__file__).parents[1] / "fixtures" / "tiny_video_experiment.py")


def made(network: str, seed: int, first: float) -> Run:
    """A run that nobody made, whose error grows by a tenth each frame."""
    curve = [first + i / 10 for i in range(4)]
    scores = {"mse/mean": sum(curve) / 4, **{f"mse/{i}": value for i, value in enumerate(curve, start=1)}}
    return Run(
        config="experiment/moving_digits",
        network=network,
        seed=seed,
        seconds=20.0,
        net={"type": "builtins.dict"},
        parameters=1_500_000,
        steps=100,
        s_per_step=0.05,
        peak_gib=None,
        loss=0.4,
        scores=scores | {key.replace("mse", "ssim"): 1 - value for key, value in scores.items()},
        notes="Digits.",
        environment=Environment(
            device="a GPU", threads=1, torch="2", timm="1", triton=None, numba=None, commit="0123abc"
        ),
    )


@pytest.mark.slow
def test_models_are_compared_end_to_end(tmp_path, capsys):
    out, picture = tmp_path / "runs.jsonl", tmp_path / "runs.png"
    command = ["experiment", "run", TINY, "--out", str(out), "--seconds", "0.2", "--seeds", "3"]
    assert vision_ssm(command) == 0
    assert "convs5, seed 3: ssim/mean " in capsys.readouterr().out
    assert vision_ssm(command) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    runs = {run.network: run for run in read_runs(out)}
    assert [*runs] == ["convs5", "conv_lstm", "transformer"]
    for run in runs.values():
        assert [*run.scores] == [f"{name}/{key}" for name in ("mse", "ssim") for key in ("mean", 1, 2, 3, 4)]
        assert run.scores["mse/mean"] == pytest.approx(sum(run.scores[f"mse/{i}"] for i in (1, 2, 3, 4)) / 4)
        assert json.loads(json.dumps(run.net)) == run.net
    assert runs["convs5"].net["stack"]["type"] == "vision_ssm.video.convs5.convs5_stack"

    assert vision_ssm(["experiment", "render", str(out), "--figure", str(picture)]) == 0
    assert "| `conv_lstm` |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_half_the_frames_and_all():
    runs = [made("convs5", 0, 0.1), made("convs5", 1, 0.3), made("conv_lstm", 0, 0.5)]
    lines = render(runs).splitlines()
    head, _, first, second = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    )
    assert head[2:6] == [
        "MSE, frames 1 to 2",
        "MSE, frames 1 to 4",
        "SSIM, frames 1 to 2",
        "SSIM, frames 1 to 4",
    ]
    assert first[0] == "`convs5`" and first[2] == "0.2500 (0.1500 to 0.3500)"
    assert first[5] == "0.6500 (0.5500 to 0.7500)" and first[-1] == "2"
    assert second[3] == "0.6500 (0.6500 to 0.6500)"
    assert "the range is that of the seeds" in lines[-1] and "Dice" not in lines[-1]


def test_the_figure_has_a_curve_for_each_network():
    figure = compare([made("convs5", 0, 0.1), made("convs5", 1, 0.3), made("conv_lstm", 0, 0.5)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["MSE", "SSIM"]
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["convs5", "conv_lstm"]
    assert lines[0].get_ydata() == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert lines[0].get_xdata().tolist() == [1, 2, 3, 4]


def test_a_frame_that_was_not_finite_is_no_number():
    run = made("convs5", 0, 0.1)
    lost = replace(run, scores={**run.scores, "mse/4": None})
    assert "nan" in render([lost])


def test_the_experiment_is_the_one_that_was_asked_for():
    config = load_config("experiment/moving_digits")
    assert config.train_dataloader.dataset.dataset.frames == 100
    assert config.model.context == 50
    generated = config.test_dataloader.dataset.frames - config.model.context
    assert generated == 400
    for metric in config.test_evaluator:
        assert tuple(metric["frames"]) == tuple(range(1, generated + 1))
    assert isinstance(build(config.test_evaluator)[0], FrameMSE)
    with torch.device("meta"):
        nets = {name: build(network_of(config, name)) for name in config.entrants}
    assert {name: net.join.out_channels for name, net in nets.items()} == dict.fromkeys(nets, 256)
    assert (
        len(nets["convs5"].stack.layers) == len(nets["conv_lstm"].stack.layers) == len(nets["transformer"].stack.blocks)
    )
