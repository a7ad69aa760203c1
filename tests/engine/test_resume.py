"""Runs that are killed, stopped or out of disk go on as if nothing had happened; files that lie are refused.

Run as a program, this file starts two training runs that are killed: see ``main``.
"""

import ast
import errno
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from rich.console import Console
from torch.testing import assert_close
from torch.utils._pytree import keystr, tree_leaves_with_path

from vision_ssm.engine.checkpoint import find_checkpoint, read_checkpoint, read_state, write_atomically
from vision_ssm.engine.config import load_config
from vision_ssm.engine.training.build import build_runner
from vision_ssm.engine.training.hooks import TrainingInterrupted, random_state, set_random_state
from vision_ssm.engine.training.train import loss_curve, train
from vision_ssm.tools import __main__ as cli

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "fixtures" / "tiny_unet.py")
QUIET = Console(quiet=True)
STEPS = 5


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(AmpOptimWrapper):
    """mmengine's wrapper with a loss scaler, which asks for a GPU, on a CPU."""

    def __init__(self, **options) -> None:
        OptimWrapper.__init__(self, **options)
        self.cast_dtype = None
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self._scale_update_param = None


def config(*overrides: str):
    """Averaged weights, a loss scaler, a schedule, random variants of patches; a checkpoint every two steps."""
    wrapper = ["optim_wrapper.type=ScaledOptimWrapper", "optim_wrapper.clip_grad={'max_norm': 1.0}"]
    averages = "custom_hooks=[{'type': 'EMAHook', 'momentum': 0.3}]"
    return load_config(TINY, [f"train_cfg.max_iters={STEPS}", *wrapper, averages, *overrides])


class Signal(Hook):
    """Sends this process a signal before step ``step``."""

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.step:
            os.kill(os.getpid(), self.number)


def main(folder: Path, step: int) -> None:
    """Starts two runs: one is killed before a step, the other when half of its second checkpoint is written."""
    write_bytes = Path.write_bytes

    def half(path: Path, content) -> int:
        if "iter_4" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, bytes(content[: len(content) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    torch.use_deterministic_algorithms(True, warn_only=True)  # as the tests do
    for name, hooks, write in (("step", (Signal(signal.SIGKILL, step),), write_bytes), ("write", (), half)):
        child = os.fork()
        if child == 0:
            Path.write_bytes = write
            build_runner(config(), folder / name, hooks=hooks).train()
        assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(), folder, console=QUIET)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Folder of the runs that ``main`` starts, killed before a step that is random each time."""
    folder = tmp_path_factory.mktemp("killed")
    step = random.SystemRandom().randrange(3, STEPS + 1)
    done = subprocess.run([sys.executable, __file__, folder, str(step)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    """The last checkpoints hold the same numbers: losses, scores, weights, averages, optimizer, scaler, generators."""
    ours, theirs = (read_checkpoint(run / f"iter_{STEPS}.pth") for run in (folder, other))
    curves = ("train/loss", "train/lr", "train/grad_norm", "val/dice/mean")
    for one in (ours, theirs):
        one["message_hub"] = {name: one["message_hub"]["log_scalars"][name] for name in curves}
        del one["meta"]
    assert len(ours["message_hub"]["train/loss"][0]) == STEPS
    assert ours.keys() == theirs.keys() >= {"ema_state_dict", "optimizer", "param_schedulers", "random_states"}
    for (place, one), (other_place, two) in zip(*map(tree_leaves_with_path, (ours, theirs)), strict=True):
        assert place == other_place
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, keystr(place)
    assert ours["optimizer"]["loss_scaler"]["scale"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "write"])
def test_a_killed_run_goes_on_bit_for_bit(moment, killed, whole):
    folder = killed / moment
    partial = folder / ".partial-iter_4.pth"
    assert partial.is_file() == (moment == "write")
    assert not (folder / f"iter_{STEPS}.pth").exists()
    train(config(), folder, console=QUIET, resume="latest")
    assert_same_run(folder, whole)
    assert not partial.exists()


def drawn() -> list[float]:
    return [torch.rand(()).item(), np.random.standard_normal(), random.gauss(0.0, 1.0)]


def test_every_generator_goes_back(tmp_path):
    """Through a file; the odd number of normal draws is part of the state."""
    drawn()
    torch.save(random_state(), tmp_path / "state.pth")
    first = [drawn() for _ in range(3)]
    assert [drawn() for _ in range(3)] != first
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [drawn() for _ in range(3)] == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_run_that_is_asked_to_stop_keeps_its_last_step(number, whole, tmp_path):
    handler = signal.getsignal(number)
    stopped = build_runner(config(), tmp_path / "run", hooks=(Signal(number, 3),))
    with pytest.raises(TrainingInterrupted, match=r"after step 3; kept .*iter_3\.pth"):
        stopped.train()
    assert signal.getsignal(number) is handler
    assert len(loss_curve(stopped)) == 3
    train(config(), tmp_path / "run", console=QUIET, resume="latest")
    assert_same_run(tmp_path / "run", whole)


def test_what_is_published_are_the_averages(whole):
    last = read_checkpoint(whole / f"iter_{STEPS}.pth")
    averages = {name: value for name, value in last["state_dict"].items() if name.startswith("net.")}
    assert_close(read_state(whole / "weights.safetensors"), {n.removeprefix("net."): v for n, v in averages.items()})
    weights = {name: last["ema_state_dict"][f"module.{name}"] for name in averages}
    assert any(not torch.equal(averages[name], weights[name]) for name in averages)


def test_the_previous_checkpoint_where_the_latest_is_damaged(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = run / f"iter_{STEPS}.pth"
    last.write_bytes(last.read_bytes()[:-5000])
    arguments = ["train", TINY, "--work-dir", str(run), "--set", f"train_cfg.max_iters={STEPS}"]
    assert cli.main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert str(last) in error and "truncated" in error and "--resume previous" in error and error.count("\n") == 1
    assert find_checkpoint(run, "previous") == run / "iter_4.pth"
    train(config(), run, console=QUIET, resume="previous")
    assert_same_run(run, whole)


def test_a_checkpoint_by_its_path(whole, tmp_path):
    """In a new folder; not in one that holds another run."""
    train(config(), tmp_path / "run", console=QUIET, resume=str(whole / "iter_4.pth"))
    assert_same_run(tmp_path / "run", whole)
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        build_runner(config(), tmp_path / "run", resume=str(whole / "iter_4.pth"))


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume; start without --resume"):
        find_checkpoint(tmp_path, "previous")
    (tmp_path / "iter_10.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"iter_10\.pth is the only checkpoint in .*; there is none before"):
        find_checkpoint(tmp_path, "previous")
    for name in ("iter_9.pth", "iter_10 (copy).pth", "iter_best.pth"):
        (tmp_path / name).touch()
    assert [find_checkpoint(tmp_path, which).name for which in ("latest", "previous")] == ["iter_10.pth", "iter_9.pth"]
    with pytest.raises(FileNotFoundError, match="no such checkpoint: previuos"):
        find_checkpoint(tmp_path, "previuos")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("optimizer"), "holds no optimizer, so training cannot go on from it"),
        (lambda c: [c.pop(key) for key in ("message_hub", "random_states")], "holds no message_hub, random_states"),
        (lambda c: c["random_states"].append({}), "is of 2 processes, and this run has 1; start as many"),
        (lambda c: c.pop("ema_state_dict"), "holds no averages of the weights, and the config has an EMAHook"),
        (lambda c: c["state_dict"].popitem(), "weights of another model: 1 missing"),
    ],
    ids=["weights", "foreign", "processes", "averages", "model"],
)
def test_a_checkpoint_that_a_run_cannot_go_on_from(spoil, message, whole, tmp_path):
    checkpoint = read_checkpoint(whole / "iter_4.pth")
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "iter_4.pth")
    runner = build_runner(config(), tmp_path / "run")
    runner._resume = True
    before = [parameter.clone() for parameter in runner.model.parameters()]
    with pytest.raises(ValueError, match=message):
        runner.load_checkpoint(str(tmp_path / "iter_4.pth"))
    assert_close(list(runner.model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("state", [[1], {1: torch.ones(1)}, {"net.weight": 1.0}], ids=["list", "numbers", "no tensor"])
def test_a_state_dict_of_something_else(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "iter_1.pth")
    with pytest.raises(ValueError, match=r"iter_1\.pth has no state_dict of tensors"):
        read_checkpoint(tmp_path / "iter_1.pth")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_checkpoint_is_refused_or_whole(seed, tmp_path):
    """Cut short, or a bit turned over: never other numbers."""
    path = tmp_path / "iter_1.pth"
    saved = {"state_dict": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "meta": {"iter": 1}}
    torch.save(saved, path)
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    if seed % 2:
        content[place] ^= 1 << random.Random(seed + 1).randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert_close(read["state_dict"], saved["state_dict"], rtol=0, atol=0)


class FullDisk(Hook):
    """No file of this process may be longer than 100 kB from step ``step`` on."""

    priority = "HIGHEST"

    def __init__(self, step: int) -> None:
        self.step = step

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_full_disk_is_told_and_keeps_the_checkpoint_before(tmp_path):
    runner = build_runner(config("default_hooks.checkpoint.interval=1"), tmp_path / "run", hooks=(FullDisk(2),))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"cannot write .*iter_2\.pth \(File too large\).*repeat .* with --resume"):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_1.pth"]
    assert not list((tmp_path / "run").glob(".partial*"))
    assert read_checkpoint(tmp_path / "run" / "iter_1.pth")["meta"]["iter"] == 1
    with pytest.raises(ValueError, match="checkpoints are local files"):
        runner.save_checkpoint(str(tmp_path), "iter_9.pth", backend_args={"backend": "http"})


def test_a_disk_that_is_full_when_the_file_is_flushed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, lambda partial: partial.write_text("new"))
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_call_ends(tmp_path, monkeypatch):
    flush, replace, done = os.fsync, Path.replace, []

    def flushed(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert done == [str(tmp_path / ".partial-file"), "rename", str(tmp_path)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["default_hooks.checkpoint.max_keep_ckpts=1"], "max_keep_ckpts must be at least 2, or -1 for all"),
        (["optim_wrapper.accumulative_counts=4"], "interval must be a multiple of .*accumulative_counts, 4.* got 2"),
    ],
    ids=["keep", "accumulate"],
)
def test_configs_whose_runs_could_not_be_resumed(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_runner(load_config(TINY, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["pickle", "zip", "in the optimizer"])
def test_code_in_a_checkpoint_is_not_run(form, whole, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    payload = {"state_dict": Payload(tmp_path / "ran")}
    if form == "in the optimizer":
        payload = {**read_checkpoint(whole / "iter_4.pth"), "optimizer": Payload(tmp_path / "ran")}
    if form == "pickle":
        (run / "iter_6.pth").write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, run / "iter_6.pth")
    assert cli.main(["train", TINY, "--work-dir", str(run), "--resume"]) == 2
    assert "iter_6.pth is truncated or no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def unsafe_loads(source: str) -> list[str]:
    """Calls in a source that would run a pickle's code: torch.load without weights_only=True, pickle, NumPy's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            (name == "torch.load" and given.get("weights_only") != "True")
            or name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")
            or given.get("allow_pickle", "False") != "False"
        ):
            found.append(ast.unparse(node))
    return found


def test_nothing_in_the_package_runs_the_code_of_a_pickle():
    folders = ("vision_ssm", "kernels", "configs", "tools", "model_zoo")
    files = [ROOT / "hubconf.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert not {str(path): found for path in files if (found := unsafe_loads(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path, map_location='cpu')", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.loads(data)", True),
        ("numpy.load(path, allow_pickle=True)", True),
        ("numpy.load(path)", False),
    ],
)
def test_the_reader_of_sources_sees_them(source, unsafe):
    assert bool(unsafe_loads(f"def read(path):\n    return {source}\n")) == unsafe


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
