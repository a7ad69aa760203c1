"""Tasks of codes, and their configs from the tokenizer's training to frames that the model of codes generates."""

import json
import math
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

from vision_ssm.engine.checkpoint import save_weights
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.training.train import train
from vision_ssm.engine.video.codes import CodePrediction, CodeUsage, Tokenization, usage
from vision_ssm.tools import __main__ as cli
from vision_ssm.video import CodedVideo, NextCode, VQAutoencoder, code_loss, convs5_stack

TINY = [
    "default_hooks.logger.interval=1",
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    "param_scheduler.0.end=1",
    "param_scheduler.1.begin=1",
    "train_dataloader.batch_size=2",
    "train_dataloader.dataset.dataset.frames=5",
    "val_dataloader.dataset.frames=9",
    "val_dataloader.dataset.clips=1",
    "test_dataloader.dataset.frames=9",
    "test_dataloader.dataset.clips=1",
]


def quiet():
    return Console(file=StringIO())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a tokenizer that was trained for two steps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vq")
    train(load_config("video/moving_digits_vq_nano", TINY), folder, console=quiet())
    return folder


def test_the_tokenizers_losses_and_its_use_are_logged(tokenizer):
    metrics = json.loads((tokenizer / "metrics.json").read_text())
    assert set(metrics["scores"]) == {"mse/mean", "psnr/mean", "ssim/mean", "codes/used", "codes/perplexity"}
    log = next(tokenizer.rglob("scalars.json")).read_text()
    assert {"loss_frames", "loss_commitment", "codes_used", "perplexity"} <= set(json.loads(log.splitlines()[0]))


def test_codes_are_trained_on_the_frozen_tokenizer(tokenizer, tmp_path):
    weights = tokenizer / "weights.safetensors"
    config = load_config("video/moving_digits_codes_nano", [*TINY, f"model.tokenizer={weights}"])
    result, task = train(config, tmp_path / "run", console=quiet())
    for key, m in load_file(weights).items():
        assert_close(task.net.tokenizer.state_dict()[key].cpu(), m, rtol=0, atol=0)
    assert result.parameters == sum(m.numel() for m in task.net.model.parameters())
    assert all(map(math.isfinite, result.losses)) and result.scores["mse/mean"] > 0
    again = load_task(load_config("video/moving_digits_codes_nano"), tmp_path / "run" / "weights.safetensors")
    assert_close(dict(again.net.state_dict()), dict(task.net.state_dict()))


@pytest.mark.parametrize("name", ["moving_digits", "folder"])
def test_the_models_of_codes_fit_their_tokenizers(name):
    vq, codes = (load_config(f"video/{name}_{kind}") for kind in ("vq", "codes"))
    with torch.device("meta"):
        tokenizer, net = build(vq.model.net), build(codes.model.net)
    shapes = {key: m.shape for key, m in tokenizer.state_dict().items()}
    assert {key: m.shape for key, m in net.tokenizer.state_dict().items()} == shapes
    assert tokenizer.stride == 4
    assert vq.test_evaluator[-1].codes == tokenizer.codes
    assert f"{name}_vq" in codes.model.tokenizer


def test_training_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights of a tokenizer at .*none\.safetensors; train one"):
        coded(tokenizer=tmp_path / "none.safetensors").init_weights()


def test_another_tokenizer_is_refused(tokenizer):
    task = coded(tokenizer=tokenizer / "weights.safetensors")
    with pytest.raises(ValueError, match="holds the weights of another model"):
        task.init_weights()


def coded(**options):
    stack = convs5_stack(4, state=4, layers=1, groups=2)
    model = NextCode(stack, 8, dim=4, embedding=3, encoder=(32,), decoder=(32,), decoder_units=1, actions=3)
    vq = VQAutoencoder(codes=8, size=4, encoder=(32, 32), decoder=(32, 32))
    return CodePrediction(CodedVideo(vq, model), **{"context": 2, "tokenizer": None, **options})


def test_the_loss_is_that_of_the_next_codes():
    task = coded(label_smoothing=0.1).train()
    video, actions = torch.rand(2, 5, 1, 8, 8) * 2 - 1, torch.randint(0, 3, (2, 5))
    codes = task.net.encode(video)
    logits, _ = task.net.model(codes[:, :-1], actions[:, 1:])
    wanted = code_loss(logits, codes[:, 1:], label_smoothing=0.1)
    assert_close(task(video, actions, mode="loss")["loss"], wanted)
    with pytest.raises(ValueError, match="from 0 to 2"):
        task(video, actions + 3, mode="loss")
    with pytest.raises(ValueError, match="clips of one frame have none that follows"):
        task(video[:, :1], mode="loss")


def test_checkpointing_changes_no_gradient():
    task = coded()
    video = torch.rand(2, 5, 1, 8, 8) * 2 - 1
    grads = []
    for enable in (False, True):
        task.net.set_grad_checkpointing(enable)
        task.zero_grad()
        task(video, mode="loss")["loss"].backward()
        grads.append({key: m.grad for key, m in task.net.model.named_parameters()})
    assert task.net.model.grad_checkpointing and grads[0].keys() == grads[1].keys()
    assert_close(grads[1], grads[0])


def test_the_loss_may_be_of_some_frames():
    task = coded(kept=0.3)
    video = torch.rand(2, 5, 1, 8, 8) * 2 - 1
    codes = task.net.encode(video)
    logits, _ = task.net.model(codes[:, :-1])
    pairs = [[i, j] for i in range(4) for j in range(i)]  # two of the four frames that follow one
    possible = torch.stack([code_loss(logits[:, at], codes[:, 1:][:, at]) for at in pairs])
    found = torch.stack([task(video, mode="loss")["loss"] for _ in range(8)])
    distance = (found[:, None] - possible).abs()
    assert distance.min(dim=1).values.max() < 1e-5
    assert len(distance.argmin(dim=1).unique()) > 1


def test_dropped_actions_are_unknown():
    task = coded(action_dropout=1.0)
    video, actions = torch.rand(2, 4, 1, 8, 8) * 2 - 1, torch.randint(0, 3, (2, 4))
    task(video, actions, mode="loss")["loss"].backward()
    assert task.net.model.action.weight.grad.any(dim=1).tolist() == [False, False, False, True]


def test_predictions_are_frames():
    task = coded().eval()
    video = torch.rand(2, 5, 1, 8, 8) * 2 - 1
    found = task(video, mode="predict")
    assert [one["prediction"].shape for one in found] == [(3, 1, 8, 8)] * 2
    assert torch.equal(found[1]["truth"], video[1, 2:])


def test_numbers_out_of_range_are_refused():
    for options in ({"kept": 0.0}, {"kept": 1.5}, {"action_dropout": -0.1}, {"label_smoothing": 2.0}):
        with pytest.raises(ValueError, match="kept must be above 0"):
            coded(**options)


def test_perplexity_counts_codes_that_come_as_often():
    used, perplexity = usage(torch.tensor([5, 5, 0, 5, 0, 5, 0, 0]))
    assert_close(torch.stack([used, perplexity]), torch.tensor([0.5, 4.0]))
    metric = CodeUsage(codes=4)
    metric.process({}, [{"codes": torch.tensor([[0, 0], [1, 1]])}, {"codes": torch.tensor([[0, 1]])}])
    assert metric.evaluate(2) == pytest.approx({"codes/used": 0.5, "codes/perplexity": 2.0})


def test_the_tokenizers_losses_are_those_of_its_frames():
    task = Tokenization(VQAutoencoder(codes=8, size=4, encoder=(32,), decoder=(32,)), commitment=0.5).eval()
    video = torch.rand(1, 2, 1, 8, 8) * 2 - 1
    found, losses = task.net(video), task(video, mode="loss")
    assert_close(losses["loss_frames"], (found.frames - video).square().mean())
    assert_close(losses["loss_commitment"], 0.5 * found.commitment)
    assert losses["codes_used"] * 8 == len(found.codes.unique())


def test_eval_and_predict_serve_the_tasks_of_codes(tokenizer, tmp_path, capsys):
    """As the commands do: whole, from the config's name."""
    vq, codes = tokenizer / "weights.safetensors", tmp_path / "codes.safetensors"
    out = tmp_path / "vq.json"
    assert cli.main(["eval", "video/moving_digits_vq_nano", str(vq), "--out", str(out), "--set", *TINY]) == 0
    assert "codes/perplexity" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.read_text())
    metrics = json.loads((tokenizer / "metrics.json").read_text())
    assert written["codes/perplexity"] == pytest.approx(metrics["scores"]["codes/perplexity"])

    name = "video/moving_digits_codes_nano"
    save_weights(codes, build(load_config(name).model).net, config=name, classes=(), channels=1)
    np.save(tmp_path / "clip.npy", np.zeros((10, 24, 24), np.uint8))
    assert cli.main(["predict", name, str(codes), str(tmp_path / "clip.npy"), str(tmp_path / "out.mp4")]) == 0
    assert (tmp_path / "out.mp4").is_file()
