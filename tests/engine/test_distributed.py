"""Two processes are as good as one: gradients, scores, losses, checkpoints; replicas (DDP) and shards (FSDP).

Run under torchrun, this file is what the two processes do: see ``main``.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from rich.console import Console
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import keystr, tree_leaves_with_path
from torch.utils.data import Dataset

from vision_ssm.engine.benchmark.rows import read_rows
from vision_ssm.engine.benchmark.scale import efficiencies
from vision_ssm.engine.checkpoint import load_into, read_checkpoint, read_state
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.experiment.runs import network_of
from vision_ssm.engine.metrics import Accuracy, Dice
from vision_ssm.engine.training.build import build_runner
from vision_ssm.engine.training.device import group_left, join_group
from vision_ssm.engine.training.evaluate import evaluate, load_task
from vision_ssm.engine.training.hooks import TrainingInterrupted
from vision_ssm.engine.training.parallel import gathered, shard_units
from vision_ssm.engine.training.train import train
from vision_ssm.tools import __main__ as cli

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHARDED = ("model_wrapper_cfg.type=vision_ssm.engine.training.parallel.sharded", "model_wrapper_cfg.unit=300")
SIZES = (1, 2, 5, 7)  # of test sets, for two processes and batches of two
STEPS = 3

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for machines without a GPU")


def plane(*overrides: str):
    """The 2-D net; a loss that is a mean over samples, and nothing drawn, so that a batch may be split."""
    alike = ("model.loss.batch=False", "model.augment=[]")
    steps = (f"train_cfg.max_iters={STEPS}", "train_cfg.val_interval=10")
    return load_config(str(FIXTURES / "tiny_unet.py"), [*alike, *steps, *overrides])


def volume(*overrides: str):
    """The 3-D net of the experiment, with random variants of patches."""
    found = load_config(
        str(FIXTURES / "tiny_experiment.py"),
        [f"train_cfg.max_iters={STEPS}", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2", *overrides],
    )
    found.model["net"] = network_of(found, "umamba")
    return found


class Gradients(Hook):
    """Keeps the gradients of every step as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def before_train(self, runner) -> None:
        def keep(*_) -> None:
            named = runner.task.named_parameters()
            self.steps.append({name: gathered(one.grad).clone() for name, one in named if one.grad is not None})

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)


class StopOne(Hook):
    """The second process alone is asked to stop, in its first step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


class Cases(Dataset):
    """Case i is a line of 6 cells; what is predicted of it is right in some of them, and never as for another case."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, case: int) -> dict[str, torch.Tensor]:
        label = torch.tensor([[1, 1, 1, 0, 0, 0]])
        return {"prediction": (torch.arange(6)[None] < case).long(), "label": label}


class Given(nn.Module):
    """A task whose predictions are in its batches."""

    def test_step(self, batch):
        return [{"prediction": p, "label": t} for p, t in zip(batch["prediction"], batch["label"], strict=True)]


class Right(Accuracy):
    """Accuracy of whole cases."""

    def process(self, data_batch, data_samples) -> None:
        self.results += [torch.equal(sample["prediction"], sample["label"]) for sample in data_samples]


def scores(size: int) -> dict[str, float]:
    loader = {"dataset": Cases(size), "batch_size": 2}
    return evaluate(SimpleNamespace(test_dataloader=loader, test_evaluator=[Dice(["one"]), Right()]), Given())


def main(folder: Path) -> None:
    """What each of two processes does; the first one writes."""
    quiet = Console(quiet=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as the tests do
    kept = {}
    for name, wrapper in (("replicated", ()), ("sharded", SHARDED)):
        gradients = Gradients()
        build_runner(plane("train_dataloader.batch_size=1", *wrapper), folder / name, hooks=(gradients,)).train()
        kept[name] = gradients.steps
        train(volume(*wrapper), folder / f"volume_{name}", console=quiet)
        resumed = folder / f"resumed_{name}"
        if os.environ["RANK"] == "0":
            resumed.mkdir()
            shutil.copy(folder / f"volume_{name}" / "iter_2.pth", resumed)
        torch.distributed.barrier()
        train(volume(*wrapper), resumed, console=quiet, resume="latest")
    normed = plane("model.net.backbone=test_efficient_vmamba")  # with batch norms, each with its process's statistics
    build_runner(normed, folder / "volume_normed").train()
    with pytest.raises(TrainingInterrupted, match="after step 1"):
        build_runner(normed, folder / "resumed_normed", hooks=(StopOne(),)).train()
    build_runner(normed, folder / "resumed_normed", resume="latest").train()
    found = {str(size): scores(size) for size in SIZES}
    averages = ["custom_hooks=[{'type': 'EMAHook'}]"]
    with pytest.raises(ValueError, match="EMAHook copies whole models, and this one is sharded"):
        build_runner(plane(*SHARDED, *averages), folder / "averages")
    with pytest.raises(ValueError, match="launcher='none', but torchrun started this process; leave launcher out"):
        build_runner(plane("launcher=none"), folder / "alone")
    command = ["train", str(FIXTURES / "tiny_unet.py"), "--work-dir", str(folder / "command")]
    assert cli.main([*command, "--set", "train_cfg.max_iters=2", "train_cfg.val_interval=3"]) == 0
    assert cli.main(["scale", "measure", str(folder / "scale.jsonl"), "--suite", "scale_smoke"]) == 0
    if os.environ["RANK"] == "0":
        torch.save(kept, folder / "gradients.pt")
        (folder / "scores.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of what two processes left."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> SimpleNamespace:
    """The same steps in one process, with the batch of both."""
    gradients = Gradients()
    runner = build_runner(
        plane("train_dataloader.batch_size=2"), tmp_path_factory.mktemp("one") / "run", hooks=(gradients,)
    )
    runner.train()
    return SimpleNamespace(gradients=gradients.steps, losses=losses(Path(runner.work_dir)))


def losses(run: Path) -> list[float]:
    return read_checkpoint(run / f"iter_{STEPS}.pth")["message_hub"]["log_scalars"]["train/loss"][0].tolist()


way = pytest.mark.parametrize("way", ["replicated", "sharded"])


@pytest.mark.slow
@way
def test_gradients_are_those_of_one_process(way, two, one):
    kept = torch.load(two / "gradients.pt", weights_only=True)[way]
    assert len(kept) == len(one.gradients) == STEPS
    assert kept[0].keys() == one.gradients[0].keys()
    for name, gradient in one.gradients[0].items():
        assert_close(kept[0][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.slow
@way
def test_losses_are_means_over_both(way, two, one):
    assert losses(two / way) == pytest.approx(one.losses, rel=1e-3)
    assert losses(two / way)[0] == pytest.approx(one.losses[0], rel=1e-6)


@pytest.mark.slow
def test_nothing_is_counted_twice_or_lost(two):
    found = json.loads((two / "scores.json").read_text())
    assert found == {str(size): pytest.approx(scores(size)) for size in SIZES}
    assert found["7"]["accuracy/top1"] == pytest.approx(1 / 7)
    assert len({found[str(size)]["dice/mean"] for size in SIZES}) == len(SIZES)


@pytest.mark.slow
@way
def test_checkpoints_are_those_of_one_process(way, two):
    """They hold whole tensors, load strictly into a plain model, and what is published is the same."""
    run = two / f"volume_{way}"
    checkpoint = read_checkpoint(run / f"iter_{STEPS}.pth")
    task = build(volume().model)
    load_into(task, checkpoint["state_dict"], run)
    published = read_state(run / "weights.safetensors")
    assert_close(published, dict(load_task(volume(), run / f"iter_{STEPS}.pth").net.state_dict()), rtol=0, atol=0)
    optimizer = torch.optim.AdamW(task.parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter in task.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["scores"]["dice/mean"] == pytest.approx(evaluate(volume(), task.eval())["dice/mean"], abs=1e-6)


@pytest.mark.slow
def test_shards_train_as_replicas_do(two):
    ways = [read_checkpoint(two / f"volume_{way}" / f"iter_{STEPS}.pth") for way in ("replicated", "sharded")]
    curves = [one["message_hub"]["log_scalars"] for one in ways]
    for name in ("train/loss", "train/grad_norm", "val/dice/mean"):
        assert_close(curves[0][name][0], curves[1][name][0], rtol=1e-3, atol=1e-4)
    assert torch.equal(ways[0]["random_states"][1]["cpu"], ways[1]["random_states"][1]["cpu"])
    assert not torch.equal(ways[0]["random_states"][0]["cpu"], ways[0]["random_states"][1]["cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicated", "sharded", "normed"])
def test_two_processes_resume_bit_for_bit(way, two):
    whole, resumed = (read_checkpoint(two / f"{run}_{way}" / f"iter_{STEPS}.pth") for run in ("volume", "resumed"))
    curves = ("train/loss", "train/lr")
    for checkpoint in (whole, resumed):
        checkpoint["message_hub"] = {name: checkpoint["message_hub"]["log_scalars"][name] for name in curves}
        del checkpoint["meta"]
    for (place, ours), (other, theirs) in zip(*map(tree_leaves_with_path, (resumed, whole)), strict=True):
        assert place == other
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, keystr(place)


def test_units_are_called_items_of_lists():
    """Of a size, inner ones first, and no weight twice; a part that a parent may read is none."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(10, 10)
            self.mlp = nn.Sequential(nn.Linear(10, 100), nn.GELU(), nn.Linear(100, 10))

    net = nn.Sequential(nn.ModuleList([Block(), Block()]), nn.Linear(10, 1))
    first, second = net[0]
    assert shard_units(net, 1000) == [second.mlp[2], second.mlp[0], first.mlp[2], first.mlp[0]]
    assert shard_units(net, 2000) == [second, first]
    assert shard_units(net, 10_000) == []


@pytest.fixture
def launched(monkeypatch):
    """As torchrun starts the only one of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    meeting = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**alone, **meeting}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_group_is_left_by_who_joined_it(launched):
    with group_left():
        join_group()
        with group_left():
            join_group()
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_after_an_error_a_group_is_given_up(launched, monkeypatch):
    given_up = []
    monkeypatch.setattr(torch.distributed.ProcessGroup, "abort", lambda group: given_up.append(group))
    with pytest.raises(ValueError, match="damaged"), group_left():
        join_group()
        raise ValueError("damaged")
    assert given_up == [torch.distributed.group.WORLD]


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of a depthwise convolution; no error, it says
def test_the_command_leaves_its_group(launched, tmp_path):
    command = ["train", str(FIXTURES / "tiny_unet.py"), "--work-dir", str(tmp_path / "run")]
    assert cli.main([*command, "--set", "train_cfg.max_iters=1", "train_cfg.val_interval=2"]) == 0
    assert not torch.distributed.is_initialized()


def test_a_launcher_that_did_not_start_the_process(tmp_path):
    with pytest.raises(ValueError, match="launcher='pytorch', but torchrun did not start this process"):
        build_runner(plane("launcher=pytorch"), tmp_path / "run")


@pytest.mark.slow
def test_how_training_scales(two, tmp_path, capsys):
    alone = tmp_path / "one.jsonl"
    assert cli.main(["scale", "measure", str(alone), "--suite", "scale_smoke"]) == 0
    rows = read_rows(two / "scale.jsonl")
    assert [(row.subject, row.case, row.processes, row.batch) for row in rows] == [
        ("test_vmamba", "32 px, replicated", 2, 4),
        ("SegMamba", "16 px, sharded", 2, 2),
    ]
    assert all(row.timing.runs == 3 and row.timing.median_ms > 0 for row in rows)
    threads = [replace(row, environment=rows[0].environment) for row in read_rows(alone)]  # torchrun sets them
    for (row, efficiency), single in zip(efficiencies([*threads, *rows]), threads, strict=True):
        assert efficiency == pytest.approx(row.samples_per_s / single.samples_per_s / 2)
        assert row.samples_per_s == pytest.approx(1e3 * row.batch / row.timing.median_ms)
    assert cli.main(["scale", "compare", str(two / "scale.jsonl")]) == 2
    assert "has no row of one process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_speaks_once(two):
    assert (two / "stdout").read_text().count("Dice mean") == 1
    assert json.loads((two / "command" / "metrics.json").read_text())["steps"] == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
