"""A comparison under one budget: it goes on where it stopped, shares its runs, and its table says what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_ssm.engine.benchmark.rows import Environment
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.experiment.comparison import compare, difference, interval, render
from vision_ssm.engine.experiment.runs import Job, Run, append, jobs, network_of, perform, read_runs, share
from vision_ssm.engine.tasks import count_parameters
from vision_ssm.tools.__main__ import main as vision_ssm

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "fixtures" / "tiny_experiment.py")
CT = ROOT.parent / "shared" / "data" / "ct_abdomen_3mm"
EXPERIMENTS = ("experiment/deep_grey", "experiment/ct_abdomen")


def made(network: str, seed: int = 0, **changes) -> Run:
    """A run that nobody made."""
    run = Run(
        config="experiment/deep_grey",
        network=network,
        seed=seed,
        seconds=20.0,
        net={"type": "builtins.dict", "out_channels": 3},
        parameters=4_500_000,
        steps=100,
        s_per_step=0.05,
        peak_gib=2.5,
        loss=0.4,
        scores={"dice/a": 0.8, "dice/b": 0.6, "dice/mean": 0.7, "hd95/a": 2.0, "hd95/b": None, "hd95/mean": None},
        notes="One brain.",
        environment=Environment(
            device="a GPU", threads=1, torch="2", timm="1", triton=None, numba=None, commit="0123abc"
        ),
    )
    return replace(run, **changes)


def test_a_comparison_is_made_goes_on_and_is_rendered(tmp_path, capsys):
    out, picture = tmp_path / "runs.jsonl", tmp_path / "runs.png"
    command = ["experiment", "run", TINY, "--out", str(out), "--seconds", "0.2", "--seeds", "3", "4"]
    command += ["--networks", "umamba", "umamba_identity"]
    assert vision_ssm([*command, "--limit", "0"]) == 0
    assert "no time for 4" in capsys.readouterr().out
    assert not out.exists()
    assert vision_ssm([*command, "--share", "1/2"]) == 0
    assert [(run.network, run.seed) for run in read_runs(out)] == [("umamba_identity", 3), ("umamba_identity", 4)]
    assert vision_ssm(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 2
    assert "holds 4 of 4 runs" in shown

    runs = {(run.network, run.seed): run for run in read_runs(out)}
    assert len(runs) == 4
    assert runs["umamba", 3].scores != runs["umamba", 4].scores
    assert runs["umamba_identity", 3].net["mixer"] == "identity"
    assert runs["umamba_identity", 3].parameters < runs["umamba", 3].parameters
    for run in runs.values():
        assert run.steps * run.s_per_step <= 2 * run.seconds  # the last step ends a little after the budget
        assert run.loss > 0
        assert 0 <= run.scores["dice/mean"] <= 1
        assert run.peak_gib is None or torch.cuda.is_available()

    assert vision_ssm(["experiment", "render", str(out), "--figure", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "| `umamba` |" in table
    assert "Colin27" in table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_first_loss(tmp_path):
    """The seed reaches the weights and the patches: a budget of no length is one step after those off the clock."""
    config = load_config(TINY)
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.jsonl"
        perform(config, [Job(config="tiny", network="segresnet", seed=seed, seconds=1e-9)], out)
        (run,) = read_runs(out)
        assert run.steps == 1
        losses.append(run.loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    command = ["experiment", "run", TINY, "--out", str(out), "--seconds", "0.1", "--seeds", "0"]
    broken = ["--networks", "umamba", "segresnet", "--set", "entrants.umamba.form=sideways"]
    assert vision_ssm([*command, *broken]) == 1
    assert "umamba, seed 0: failed: " in capsys.readouterr().out
    assert [run.network for run in read_runs(out)] == ["segresnet"]


def test_seeds_come_first_and_shares_are_apart():
    config = load_config(TINY)
    planned = jobs(config, seeds=(0, 1), seconds=5)
    assert [job.seed for job in planned] == [0, 0, 0, 1, 1, 1]
    assert {job.network for job in planned} == set(config.entrants)
    parts = [job for i in range(4) for job in jobs(config, seeds=(0, 1), seconds=5, share_of=f"{i}/4")]
    assert sorted(parts, key=planned.index) == planned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ["unet"]}, "unknown networks unet; the config has segresnet"),
        ({"seconds": 0}, "needs time to train"),
        ({"share_of": "4/4"}, "share '4/4' is not I/N"),
        ({"share_of": "half"}, "share 'half' is not I/N"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        jobs(load_config(TINY), **({"seeds": (0,), "seconds": 1} | changes))


def test_a_config_without_entrants_is_refused():
    with pytest.raises(ValueError, match="compares no networks"):
        jobs(load_config("medical/deep_grey_3d_umamba"), seeds=(0,), seconds=1)


def test_runs_of_another_network_or_device_are_not_taken_for_these(tmp_path):
    config, out = load_config(TINY), tmp_path / "runs.jsonl"
    job = jobs(config, seeds=(0,), seconds=20.0, networks=["umamba"])[0]
    append(out, made("umamba", config=job.config))
    with pytest.raises(ValueError, match=r"holds umamba, seed 0, built by .*the config says .*Give another file"):
        perform(config, [job], out)
    out.unlink()
    append(out, made("umamba", config=job.config, net=network_of(config, "umamba")))
    with pytest.raises(ValueError, match=r"holds runs on a GPU; times compare on one device only"):
        perform(config, [job], out)


def test_lines_come_back_and_others_are_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    append(path, made("umamba"))
    append(path, made("umamba", seed=1))
    assert read_runs(path) == [made("umamba"), made("umamba", seed=1)]
    path.write_text(path.read_text() + json.dumps({"network": "umamba"}) + "\n")
    with pytest.raises(ValueError, match="line 3 is no run"):
        read_runs(path)
    with pytest.raises(FileNotFoundError, match="no such file of runs"):
        read_runs(tmp_path / "absent.jsonl")


def test_the_rate_rises_then_falls_to_zero():
    assert share(0) == pytest.approx(0.1)
    assert share(0.1) == pytest.approx(1)
    assert share(0.55) == pytest.approx(0.5)
    assert share(1) == share(1.2) == pytest.approx(0, abs=1e-12)


def scored(*dice: float) -> dict[str, float | None]:
    return {**{f"dice/{i}": value for i, value in enumerate(dice)}, "dice/mean": float(np.mean(dice)), "hd95/0": 1.0}


def test_a_table_pairs_a_network_with_its_twin():
    runs = [made("umamba_identity", seed, scores=scored(0.5, 0.7)) for seed in (0, 1)]
    runs += [made("umamba", seed, scores=scored(0.6, 0.8)) for seed in (1, 0, 2)]
    rows = [line.split("|") for line in render([*runs, made("segresnet")]).splitlines() if line.startswith("| `")]
    assert [row[1].strip() for row in rows] == ["`umamba`", "`umamba_identity`", "`segresnet`"]
    assert rows[0][4].strip() == "+0.1000 (+0.1000 to +0.1000)"  # of the two seeds that both have
    assert rows[1][4].strip() == ""
    assert rows[0][9].strip() == "3"
    assert rows[2][5].strip() == "2.00, 1 not found"
    assert rows[2][8].strip() == "2.50"


def test_differences_need_a_common_seed():
    assert difference([made("umamba", 0)], [made("umamba_identity", 1)]) == ""


def test_budgets_and_machines_have_tables_of_their_own():
    runs = [made("umamba"), made("umamba", seconds=40.0), made("umamba", config="experiment/ct_abdomen")]
    assert render(runs).count("| network |") == 3
    assert len(compare(runs).axes) == 3


def test_the_interval_covers_the_mean_and_shrinks_with_agreement():
    wide = np.random.default_rng(1).normal(0.7, 0.1, (3, 6))
    narrow = 0.7 + (wide - 0.7) / 10
    (low, high), (inner_low, inner_high) = interval(wide), interval(narrow)
    assert low < wide.mean() < high
    assert high - low == pytest.approx(10 * (inner_high - inner_low))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_entrants_have_about_equal_parameters(name):
    config = load_config(name)
    counts = {entrant: count_parameters(build(network_of(config, entrant))) for entrant in config.entrants}
    assert len(counts) == 9
    assert all(4e6 < count < 5e6 for count in counts.values()), counts
    for entrant in ("ssm_unet", "umamba", "segmamba"):
        assert 0.95 * counts[entrant] < counts[f"{entrant}_identity"] < counts[entrant]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_halves_of_an_experiment_are_apart(name):
    if name == "experiment/ct_abdomen" and not CT.is_dir():
        pytest.skip(f"no data beside this checkout: {CT.parent.name}/{CT.name}")
    config = load_config(name, [f"data_root={CT}"] if "data_root" in load_config(name) else [])
    patch = build(config.train_dataloader.dataset)[0]
    assert patch["image"].shape == patch["label"].shape == (1, 64, 64, 64)
    test = build(config.test_dataloader.dataset)[0]
    assert len(test["label"].unique()) == len(config.classes) + 1
    train = build(config.train_dataloader.dataset["items"])[0]
    assert len(train["label"].unique()) == len(config.classes) + 1
    assert not torch.equal(train["image"][:, :40], test["image"][:, :40])
