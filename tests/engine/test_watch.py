"""Numbers that cease to be finite are named by block, tensor and step, and never reach the weights."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.testing import assert_close

from vision_ssm.engine.config import build, config_names, load_config
from vision_ssm.engine.training.build import build_runner
from vision_ssm.engine.training.nonfinite import Source, find_source
from vision_ssm.engine.training.parallel import sharded, whole
from vision_ssm.engine.training.watch import NonFiniteStep, WatchHook, gradients_of, plain, sound
from vision_ssm.tools import __main__ as cli

TINY = str(Path(__file__).parents[1] / "fixtures" / "tiny_unet.py")
BLOCK = "net.encoder.stages_1.blocks.0"


def runner_of(folder: Path, *overrides: str, hooks: tuple[Hook, ...] = ()) -> Any:
    return build_runner(load_config(TINY, ["train_cfg.val_interval=100", *overrides]), folder, hooks=hooks)


class SpoilGradient(torch.autograd.Function):
    """The identity, whose gradient does not fit into its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def overflow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 1e30 * 1e30


def overflow_backward(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return SpoilGradient.apply(output)


class Spoil(Hook):
    """Spoils one module in some steps."""

    priority = "HIGHEST"

    def __init__(self, module: str, steps: tuple[int, ...], how: Any = overflow) -> None:
        self.module, self.steps, self.how = module, steps, how
        self.handle: Any = None

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter + 1 in self.steps:
            self.handle = runner.task.get_submodule(self.module).register_forward_hook(self.how)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


class Remember(Hook):
    """What every step left."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        moments = runner.optim_wrapper.optimizer.state_dict()["state"]
        step = runner.param_schedulers[0].last_step
        self.history.append(copy.deepcopy({"weights": runner.task.state_dict(), "moments": moments, "schedule": step}))


def test_every_config_watches() -> None:
    for name in config_names():
        assert load_config(name).default_hooks.watch.type is WatchHook, name


@pytest.mark.parametrize(
    "wrapper", ["mmengine.optim.OptimWrapper", "vision_ssm.engine.training.runner.AutocastOptimWrapper"]
)
def test_an_overflow_is_named_and_its_batch_is_kept(tmp_path: Path, wrapper: str) -> None:
    remember = Remember()
    hooks = (Spoil(f"{BLOCK}.mixer.in_proj", (3,)), remember)
    runner = runner_of(tmp_path, f"optim_wrapper.type={wrapper}", hooks=hooks)
    with pytest.raises(NonFiniteStep) as stopped:
        runner.train()
    message = str(stopped.value)
    dtype = "bfloat16" if "Autocast" in wrapper else "float32"
    assert message.startswith("step 3: the loss (nan) is not finite.")
    assert f"First: output of {BLOCK}.mixer.in_proj (Linear), {dtype}." in message
    assert "--resume" in message
    assert len(remember.history) == 2
    assert_close(runner.task.state_dict(), remember.history[-1]["weights"], rtol=0, atol=0)
    moments = runner.optim_wrapper.optimizer.state_dict()["state"]
    assert_close(moments, remember.history[-1]["moments"], rtol=0, atol=0)

    (kept,) = (tmp_path / "nonfinite").iterdir()
    assert str(kept) in message
    content = torch.load(kept, weights_only=True)
    assert content["step"] == 3
    assert content["report"] in message
    with torch.autocast("cpu", torch.bfloat16, enabled="Autocast" in wrapper):
        again = find_source(runner.task, content["batch"], random=content["random_state"])
    assert again is not None
    assert f"First: {again}." in message


def test_a_rate_that_is_far_too_high_ends_the_command_by_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--set", "param_scheduler.0.eta_max=1e30", "optim_wrapper.optimizer.lr=1e30", "train_cfg.val_interval=100"]
    assert cli.main(["train", TINY, "--work-dir", str(tmp_path / "run"), *rate]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # the start of a run may log a line before
    assert error.startswith("vision-ssm: error: step 2: the loss (nan) is not finite. First: ")
    assert "default_hooks.watch.action=skip" in error


@pytest.mark.parametrize("clip", [(), ("optim_wrapper.clip_grad={'max_norm': 1.0}",)], ids=["plain", "clipped"])
def test_a_gradient_that_overflows_is_named(tmp_path: Path, clip: tuple[str, ...]) -> None:
    runner = runner_of(tmp_path, *clip, hooks=(Spoil(f"{BLOCK}.mixer.scan", (2,), overflow_backward),))
    with pytest.raises(NonFiniteStep, match=r"step 2: a gradient is not finite\. First: gradient of") as stopped:
        runner.train()
    assert f"of {BLOCK}.mixer.scan (RoutedScan), float32" in str(stopped.value)


def test_a_skipped_step_changes_neither_weights_nor_moments_nor_statistics(tmp_path: Path) -> None:
    net = "model.net.backbone=test_efficient_vmamba"  # whose norms keep running statistics
    average, remember = EMAHook(momentum=0.5), Remember()
    hooks = (average, Spoil("net.encoder.stages_0.blocks.0.norm", (2, 3)), remember)
    runner = runner_of(tmp_path, net, "default_hooks.watch.action=skip", hooks=hooks)
    runner.train()
    first, second, third, fourth = remember.history
    assert any("running_mean" in name for name in first["weights"])
    for skipped in (second, third):
        assert_close(skipped["weights"], first["weights"], rtol=0, atol=0)
        assert_close(skipped["moments"], first["moments"], rtol=0, atol=0)
    assert {int(moment["step"]) for moment in fourth["moments"].values()} == {2}
    assert any(not torch.equal(fourth["weights"][name], value) for name, value in first["weights"].items())
    assert [moment["schedule"] for moment in remember.history] == [1, 2, 3, 3]  # one cycle ends at its last step
    assert int(average.ema_model.steps) == 4
    assert all(value.isfinite().all() for value in average.ema_model.state_dict().values())
    assert [path.name for path in sorted((tmp_path / "nonfinite").iterdir())] == ["step_2.pth", "step_3.pth"]


def test_steps_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    settings = ("default_hooks.watch.action=skip", "default_hooks.watch.limit=2")
    runner = runner_of(tmp_path, *settings, hooks=(Spoil(f"{BLOCK}.mlp", (1, 2, 3)),))
    with pytest.raises(NonFiniteStep, match=rf"step 2: the loss \(nan\).*output of {BLOCK}\.mlp"):
        runner.train()


def test_no_more_batches_are_kept_than_the_disk_is_meant_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_ssm.engine.training.watch.KEPT", 1)
    settings = ("default_hooks.watch.action=skip", "default_hooks.watch.limit=2")
    runner = runner_of(tmp_path, *settings, hooks=(Spoil(f"{BLOCK}.mlp", (1, 2, 3)),))
    with pytest.raises(NonFiniteStep, match=r"Its batch is not kept: \S+nonfinite holds 1 already\. Weights are"):
        runner.train()
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["step_1.pth"]


@pytest.mark.filterwarnings("ignore:Detected call of `scheduler.step:UserWarning")  # mmengine's way to accumulate
def test_an_accumulated_batch_is_named_when_it_comes(tmp_path: Path) -> None:
    remember = Remember()
    hooks = (Spoil(f"{BLOCK}.mixer.scan", (1,), overflow_backward), remember)
    settings = ("optim_wrapper.accumulative_counts=2", "default_hooks.watch.action=skip", "train_cfg.max_iters=2")
    runner_of(tmp_path, *settings, hooks=hooks).train()
    (kept,) = (tmp_path / "nonfinite").iterdir()
    assert kept.name == "step_1.pth"
    assert all(value.isfinite().all() for value in remember.history[-1]["weights"].values())
    assert {int(moment["step"]) for moment in remember.history[-1]["moments"].values()} == {1}


@pytest.mark.parametrize(
    ("option", "message"), [({"action": "warn"}, "action must be one of"), ({"limit": 0}, "limit")]
)
def test_other_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatchHook(**option)


class Branches(BaseModel):
    """x + slope * second(first(x)), so that a gradient comes along two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mode: str = "tensor", scale: float = 1.0) -> dict[str, Tensor]:
        y = self.norm(self.first(x))
        return {"loss_near": (y + self.second(y)).square().mean() * scale, "loss_far": y.abs().mean()}


@pytest.fixture
def branches() -> Branches:
    return Branches()


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"x": torch.randn(4, 3), "mode": "loss"}


def found(task: Branches, batch: dict[str, Any]) -> tuple[str, str]:
    source = find_source(task, batch)
    assert source is not None
    return source.block, source.tensor


def test_a_sound_step_has_no_source_and_leaves_no_gradient(branches: Branches, batch: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    assert find_source(branches, batch) is None
    assert all(parameter.grad is None for parameter in branches.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in branches.modules())


def test_a_bad_batch_is_named_before_the_blocks_it_spoils(branches: Branches, batch: dict[str, Any]) -> None:
    batch["x"][1, 1] = math.nan
    assert found(branches, batch) == ("batch", "x")


@pytest.mark.parametrize(("name", "own"), [("second.0", "weight"), ("norm", "running_var")])
def test_a_bad_weight_is_named(branches: Branches, batch: dict[str, Any], name: str, own: str) -> None:
    with torch.no_grad():
        getattr(branches.get_submodule(name), own).view(-1)[0] = math.inf
    assert found(branches, batch) == (name, own)


@pytest.mark.parametrize("name", ["first", "second.0", "second.1", "norm"])
def test_the_first_block_that_overflows_is_named(branches: Branches, batch: dict[str, Any], name: str) -> None:
    branches.get_submodule(name).register_forward_hook(overflow)
    assert found(branches, batch) == (name, "output")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
def test_the_blocks_of_a_compiled_network_are_seen(branches: Branches, batch: dict[str, Any]) -> None:
    branches.second.compile(backend="eager")
    branches(**batch)
    branches.second[0].register_forward_hook(overflow)
    assert found(branches, batch) == ("second.0", "output")


def test_a_loss_that_overflows_by_itself_is_named(branches: Branches, batch: dict[str, Any]) -> None:
    assert found(branches, {**batch, "scale": math.inf}) == ("loss", "loss_near")


@pytest.mark.parametrize("name", ["first", "second.0", "second.1", "norm"])
def test_the_block_whose_gradient_overflows_is_named(branches: Branches, batch: dict[str, Any], name: str) -> None:
    branches.get_submodule(name).register_forward_hook(overflow_backward)
    block, tensor = found(branches, batch)
    assert block == name
    assert tensor.startswith("gradient of ")


@pytest.mark.slow
def test_processes_skip_together_and_each_says_what_it_saw(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    script = Path(__file__).parents[1] / "fixtures" / "watched_process.py"
    command = [sys.executable, str(script)]
    run = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    both = [run([*command, str(rank), str(tmp_path / "meeting"), str(tmp_path / "run")]) for rank in range(2)]
    first, second = (json.loads(process.communicate(timeout=120)[0])["weights"] for process in both)
    assert first == second
    assert first[1] == first[0] != first[2]
    kept = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "run" / "nonfinite").iterdir()}
    assert "Repeated in this process, the step is finite." in kept["step_2.pth"]["report"]
    assert "First: x of batch, float32." in kept["step_2_rank_1.pth"]["report"]


def test_what_is_kept_is_plain() -> None:
    given = {1: MetaTensor(torch.ones(2)), "a": [np.arange(3), (True, None, 2.5)], "path": Path("x")}
    kept = plain(given)
    assert type(kept["1"]) is Tensor
    assert torch.equal(kept["a"][0], torch.arange(3))
    assert kept["a"][1] == [True, None, 2.5]
    assert kept["path"] == "x"


def test_of_sharded_weights_the_step_is_named(branches: Branches, batch: dict[str, Any], tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        task = sharded(branches)
        wrapper = OptimWrapper(torch.optim.SGD(task.parameters(), lr=0.1))
        hook = WatchHook()
        runner = SimpleNamespace(task=task, optim_wrapper=wrapper, iter=6, work_dir=str(tmp_path))
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        wrapper.update_params(task.parse_losses(task(**batch))[0])
        before = copy.deepcopy(whole(task.state_dict()))
        batch["x"][0, 0] = math.nan
        with pytest.raises(NonFiniteStep, match=r"step 7: the loss \(nan\).*Parameters are sharded"):
            wrapper.update_params(task.parse_losses(task(**batch))[0])
        after = whole(task.state_dict())
        assert_close(after, before, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_large_numbers_are_sound_and_others_are_not(bad: float | None, dtype: torch.dtype) -> None:
    large = torch.full((5, 3), 0.9 * torch.finfo(dtype).max, dtype=dtype)  # whose norm overflows
    if bad is not None:
        large[2, 1] = bad
    assert sound([torch.ones(4), large]) == (bad is None)


def test_empty_parts_of_gradients_are_left_out(branches: Branches) -> None:
    branches.first.weight.grad = torch.ones(3, 3)
    branches.first.bias.grad = torch.ones(3)
    branches.norm.weight = nn.Parameter(torch.empty(0))
    branches.norm.weight.grad = torch.empty(0)
    assert [gradient.numel() for gradient in gradients_of(branches)] == [9, 3]


def test_a_source_reads_as_a_sentence() -> None:
    source = Source(block="net.head", kind="Linear", tensor="output", dtype=torch.float16)
    assert str(source) == "output of net.head (Linear), float16"
    assert str(Source(block="batch", kind="", tensor="image", dtype=torch.float32)) == "image of batch, float32"


def test_a_task_of_a_config_is_searched() -> None:
    task = build(load_config(TINY).model)
    batch = {"image": torch.randn(2, 3, 12, 24), "label": torch.zeros(2, 1, 12, 24), "mode": "loss"}
    assert find_source(task.train(), batch) is None
