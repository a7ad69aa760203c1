"""The cards of published checkpoints, the table rendered from them, and the command that converts and verifies."""

import argparse
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from official_files import layouts, official
from safetensors import safe_open
from torch.testing import assert_close

import vision_ssm
from vision_ssm import model_zoo
from vision_ssm.engine.benchmark.profile import count_multiply_adds
from vision_ssm.engine.zoo import published
from vision_ssm.model_zoo import catalogue, checkpoints, converters
from vision_ssm.model_zoo.catalogue import Card, cards
from vision_ssm.tools.__main__ import main

ROOT = Path(__file__).parents[2]
SMALLEST = ["test_vmamba", "test_efficient_vmamba", "test_vim"]


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An official file of the smallest VMamba."""
    return saved(tmp_path / "official.pth", {"model": official("test_vmamba"), "epoch": 3})


@pytest.fixture
def card(source: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The only card, that of ``source``; it states a hash."""
    digest = sha256(source.read_bytes()).hexdigest()
    card = replace(cards()[-1], model="test_vmamba", file=source.name, sha256=digest, licence="MIT-0")
    monkeypatch.setattr(catalogue, "cards", lambda: (card,))
    return card


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The one line that a failing command writes."""
    assert main(["zoo", *map(str, arguments)]) == status
    error = capsys.readouterr().err
    assert error.startswith("vision-ssm: ") and error.count("\n") == 1
    return error


def written(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_every_released_model_has_one_card() -> None:
    tags = {name: timm.get_pretrained_cfg(name).tag for name in vision_ssm.list_models()}
    assert sorted(card.model for card in cards()) == [name for name, tag in tags.items() if tag != "untrained"]
    assert len({card.file for card in cards()}) == len(cards()) == 17


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.model)
def test_cards_say_what_the_registry_says_and_what_is_measured(card: Card) -> None:
    config = timm.get_pretrained_cfg(card.model)
    assert config.input_size == (3, card.image_size, card.image_size)
    assert config.license == card.licence.lower()
    assert config.url in (card.url, "")
    assert hasattr(converters, card.family)
    assert card.page.startswith("https://") and card.licence_source and 70 < card.top1 < 90
    assert card.url is None or (card.url.startswith(card.page) and card.url.endswith(f"/{card.file}"))
    assert card.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", card.sha256)
    with torch.device("meta"):
        model = timm.create_model(card.model).eval()
        total, _ = count_multiply_adds(model, torch.empty(1, 3, card.image_size, card.image_size))
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert card.multiply_adds == total


def test_the_tables_of_the_readme_are_rendered(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = tmp_path / "stale.md"
    text = readme
    for fresh, old in (("| 4.91 |", "| 4.90 |"), ("| 63.83 |", "| 63.00 |")):  # of a model, of a network
        assert text.count(fresh) == 1
        text = text.replace(fresh, old)
    stale.write_text(text, encoding="utf-8")
    assert main(["zoo", "render", "--into", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == readme


def test_a_document_without_a_place_for_the_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.md").write_text("# Nothing\n")
    assert "no block <!-- models -->" in fails(capsys, 2, "render", "--into", tmp_path / "plain.md")


def test_list_shows_families_and_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(card.model in shown and card.file in shown for card in cards())
    for which, names in (("vim", 5), ("vmamba_tiny*", 3), ("*_stride8", 2)):
        assert main(["zoo", "list", which]) == 0
        assert capsys.readouterr().out.count(" from https://") == names
    assert "efficient_vmamba, vim, vmamba" in fails(capsys, 2, "list", "resnet")


@pytest.mark.parametrize("name", SMALLEST)
def test_convert_and_verify(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official(name)
    source = saved(tmp_path / "official.pth", {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3})
    target = tmp_path / "converted.safetensors"
    assert main(["zoo", "convert", str(source), str(target)]) == 0
    assert f"model          {name}" in capsys.readouterr().out
    assert written(target) == {
        "format": "pt",
        "package": "vision_ssm",
        "version": vision_ssm.__version__,
        "model": name,
        "source_file": "official.pth",
        "source_sha256": sha256(source.read_bytes()).hexdigest(),
        "source_page": "unknown",
        "licence": "none stated",
    }
    assert len(safetensors.torch.load_file(target)) == len(state)
    for path in (source, target):
        assert main(["zoo", "verify", str(path)]) == 0
        assert f"{name}: {len(state)} tensors" in capsys.readouterr().out

    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for path in (source, target):
        through_timm = timm.create_model(name, num_classes=5, checkpoint_path=str(path)).eval()
        through_us = model_zoo.load(timm.create_model(name, num_classes=5), path).eval()
        outputs += [through_timm(images), through_us(images)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    reference = timm.create_model(name, num_classes=5).eval()(images)
    assert (outputs[0] - reference).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALLEST)
def test_every_official_tensor_lands(name: str) -> None:
    theirs, ours = layouts(name)
    assert checkpoints.is_official(theirs) and not checkpoints.is_official(ours)
    assert_close(model_zoo.convert(theirs, name), ours, rtol=0, atol=0)


def test_the_shapes_tell_the_models_apart() -> None:
    """What ``identify`` rests on, the classifier aside."""
    seen = {}
    with torch.device("meta"):
        for name in vision_ssm.list_models():
            state = timm.create_model(name, num_classes=0).state_dict()
            seen[name] = tuple((key, value.shape) for key, value in state.items())
    assert len(set(seen.values())) == len(seen)


def test_settings_beside_the_weights_are_accepted_and_averages_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training scripts save them; yacs need not be there when they are read."""

    class CfgNode(dict):  # type: ignore[type-arg]
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    config = CfgNode(lr=0.1, model=CfgNode(name="x"))
    config.frozen = True  # type: ignore[attr-defined]
    weights = official("test_vmamba")
    average = {key: torch.zeros_like(value) for key, value in weights.items()}
    content = {"model": weights, "model_ema": average, "args": argparse.Namespace(lr=0.1, path="x"), "config": config}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", types.ModuleType("yacs.config"))
        patch.setattr(sys.modules["yacs.config"], "CfgNode", CfgNode, raising=False)
        source = saved(tmp_path / "official.pth", content)
    target = tmp_path / "out.safetensors"
    assert main(["zoo", "convert", str(source), str(target)]) == 0
    assert "left_out       model_ema" in capsys.readouterr().out
    assert_close(safetensors.torch.load_file(target), model_zoo.convert(weights, "test_vmamba"), rtol=0, atol=0)
    overlay = {"file": str(source), "num_classes": 5}
    for options in ({"checkpoint_path": str(source)}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
        model = timm.create_model("test_vmamba", num_classes=5, **options)
        assert not any(parameter.any() for parameter in model.parameters())  # timm takes the average
    settings = saved(tmp_path / "settings.pth", content["args"])
    with pytest.raises(Exception, match="Weights only load failed"):  # the allowance ended with the reading
        torch.load(settings, weights_only=True)


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
@pytest.mark.parametrize("name", SMALLEST)
def test_prefixes_of_data_parallel_training_are_taken_off(name: str, prefix: str, tmp_path: Path) -> None:
    """Both stand before the keys of EfficientVMamba's release."""
    theirs, ours = layouts(name)
    content = {"state_dict": {prefix + key: value for key, value in theirs.items()}}
    path = saved(tmp_path / "official.ckpt", content)
    for model in (
        timm.create_model(name, num_classes=5, checkpoint_path=str(path)),
        model_zoo.load(timm.create_model(name, num_classes=5), path),
    ):
        assert_close(model.state_dict(), ours, rtol=0, atol=0)
    content["state_dict"]["stray"] = torch.zeros(1)  # not before all keys, then
    with pytest.raises(ValueError, match=r"unexpected: .*stray"):
        model_zoo.load(timm.create_model(name, num_classes=5), content)


def test_a_card_gives_licence_and_hash(card: Card, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "out.safetensors"
    assert main(["zoo", "convert", str(source), str(target)]) == 0
    assert written(target)["licence"] == "MIT-0" and written(target)["source_page"] == card.page
    for path in (source, target):
        assert main(["zoo", "verify", str(path)]) == 0
        assert f"{card.sha256} (as published)" in capsys.readouterr().out


def test_a_wrong_hash_is_refused(
    card: Card, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted.safetensors"
    published.convert_file(source, converted)
    other = replace(card, sha256="0" * 64)
    monkeypatch.setattr(catalogue, "cards", lambda: (other,))
    for path in (source, converted):
        error = fails(capsys, 1, "verify", path)
        assert f"has the SHA-256 {card.sha256}" in error and "0" * 64 in error and "download it again" in error
    assert "download it again" in fails(capsys, 2, "convert", source, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_a_card_of_another_model_is_not_applied(card: Card, source: Path, tmp_path: Path) -> None:
    saved(source, official("test_vim"))
    published.convert_file(source, tmp_path / "out.safetensors", model="test_vim")
    assert written(tmp_path / "out.safetensors")["licence"] == "none stated"


def test_another_model_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.safetensors"
    for status, command in ((1, ["verify", source]), (2, ["convert", source, target])):
        error = fails(capsys, status, *command, "--model", "vmamba_tiny")
        assert "does not fit vmamba_tiny" in error and "missing: stages.0.blocks.1" in error
        assert "unknown model 'vmamba_huge'" in fails(capsys, 2, *command, "--model", "vmamba_huge")
    assert not target.exists()


def test_wrong_keys_are_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official("test_vmamba")
    state["layers.0.blocks.0.op.extra"] = state.pop("layers.0.blocks.0.op.Ds")
    state["layers.1.blocks.0.op.A_logs"] = torch.zeros(7, 1)
    state["classifier.norm.weight"] = torch.zeros(5)
    source = saved(tmp_path / "official.pth", {"model": state})
    listed = (
        "1 missing: stages.0.blocks.0.mixer.scan.D",
        "1 unexpected: stages.0.blocks.0.mixer.extra",
        "stages.1.blocks.0.mixer.scan.A_log (7, 1), not (4, 24, 1)",
        "norm.weight (5,), not (48,)",
    )
    error = fails(capsys, 1, "verify", source, "--model", "test_vmamba")
    assert all(complaint in error for complaint in listed)
    assert "fits no model" in fails(capsys, 1, "verify", source)
    assert "fits no model" in fails(capsys, 2, "convert", source, tmp_path / "out.safetensors")

    with pytest.raises(RuntimeError) as refused:
        timm.create_model("test_vmamba", num_classes=5, checkpoint_path=str(source))
    message = str(refused.value)
    assert 'Missing key(s) in state_dict: "stages.0.blocks.0.mixer.scan.D"' in message
    assert 'Unexpected key(s) in state_dict: "stages.0.blocks.0.mixer.extra"' in message
    assert "size mismatch for stages.1.blocks.0.mixer.scan.A_log" in message
    assert "size mismatch for norm.weight" in message


def test_weights_that_give_no_number_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official("test_vmamba")
    state["classifier.norm.bias"][0] = torch.nan
    assert "not finite" in fails(capsys, 1, "verify", saved(tmp_path / "official.pth", state))


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("executed",)


def test_code_in_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "evil.pth", {"model": official("test_vmamba"), "args": Payload()})
    for status, command in ((1, ["verify", source]), (2, ["convert", source, tmp_path / "out.safetensors"])):
        assert main(["zoo", *map(str, command)]) == status
        shown = capsys.readouterr()
        assert "holds print, which could run code" in shown.err
        assert "executed" not in shown.out + shown.err
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_truncated_files_are_refused(
    kept: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted.safetensors"
    published.convert_file(source, converted)
    for path in (source, converted):
        path.write_bytes(path.read_bytes()[:kept])
        assert "truncated" in fails(capsys, 1, "verify", path)
    assert "truncated" in fails(capsys, 2, "convert", source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\x80\x02.", b"\x00" * 50, bytes(range(256))])
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    assert "cannot be read as a checkpoint" in fails(capsys, 1, "verify", path)


def test_only_official_layouts_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = saved(tmp_path / "own.pth", timm.create_model("test_vmamba").state_dict())
    assert "needs no conversion" in fails(capsys, 2, "convert", own, tmp_path / "out.safetensors")
    assert main(["zoo", "verify", str(own)]) == 0


def test_the_target_is_new_and_can_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.safetensors"
    assert "no such checkpoint" in fails(capsys, 2, "convert", tmp_path / "absent.pth", target)
    assert "no such checkpoint" in fails(capsys, 2, "verify", tmp_path / "absent.pth")
    assert ".safetensors" in fails(capsys, 2, "convert", source, tmp_path / "out.pth")
    assert "no such folder" in fails(capsys, 2, "convert", source, tmp_path / "nowhere" / target.name)
    assert "no such folder" in fails(capsys, 2, "convert", source, source / target.name)
    target.write_text("precious")
    assert "--overwrite" in fails(capsys, 2, "convert", source, target)
    assert target.read_text() == "precious"
    assert main(["zoo", "convert", str(source), str(target), "--overwrite"]) == 0
    assert written(target)["model"] == "test_vmamba"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert f"cannot write to {closed}" in fails(capsys, 2, "convert", source, closed / "out.safetensors")


@pytest.mark.parametrize(("failure", "status"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)], ids=str)
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_conversion_leaves_nothing(
    failure: BaseException,
    status: int,
    earlier: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out.safetensors"
    if earlier:
        target.write_text("precious")

    def stop(descriptor: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2 + earlier  # the file that is being written
        raise failure

    monkeypatch.setattr(os, "fsync", stop)
    fails(capsys, status, "convert", source, target, "--overwrite")
    assert sorted(tmp_path.iterdir()) == sorted([source, *([target] if earlier else [])])
    assert not earlier or target.read_text() == "precious"
