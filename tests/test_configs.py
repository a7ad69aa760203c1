"""Every config loads, builds and takes a step; what is misspelt is named."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from vision_ssm.engine.config import build, config_name, config_names, load_config
from vision_ssm.engine.training.build import build_loader, build_runner

UNET = "medical/deep_grey_vmamba_unet"


def test_configs_are_found_by_name_and_by_path():
    assert UNET in config_names()
    assert not [name for name in config_names() if "_base_" in name or "__" in name]
    by_name = load_config(UNET)
    by_path = load_config(by_name.filename)
    assert by_name.model == by_path.model
    assert config_name(by_path) == UNET


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in config_names() if name.startswith("image/")])
def test_a_config_takes_a_step(name, tmp_path):
    config = load_config(name, ["train_cfg.max_iters=1", "train_dataloader.batch_size=2"])
    for key in ("val_cfg", "val_dataloader", "val_evaluator"):
        config.pop(key)
    runner = build_runner(config, tmp_path)
    before = [parameter.detach().clone() for parameter in runner.model.net.parameters()]
    runner.train()
    after = list(runner.model.net.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert config.score.split("/")[0] in {metric.default_prefix for metric in build(config.test_evaluator)}


def test_the_test_half_is_not_the_training_half():
    config = load_config(UNET)
    train = build(config.train_dataloader.dataset).dataset
    test = next(iter(build_loader(config.test_dataloader)))
    assert test["image"].shape == (1, 5, 48, 96, 64)
    assert test["label"].shape == (1, 1, 48, 96, 64)
    middle = train[32]["image"]
    assert middle.shape == (5, 48, 96)
    assert not torch.equal(middle, test["image"][0, ..., 32])


def test_overrides_are_literals_or_strings():
    config = load_config(UNET, ["train_cfg.max_iters=7", "model.net.mixer=identity", "model.augment.0.mirror=0.25"])
    assert config.train_cfg.max_iters == 7
    assert config.model.net.mixer == "identity"
    assert config.model.augment[0].mirror == 0.25


def test_an_unknown_config_lists_the_choices():
    with pytest.raises(FileNotFoundError, match=f"no config 'medical/brain'.*{UNET}"):
        load_config("medical/brain")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_iters", "'max_iters' is not KEY=VALUE"),
        ("train_cgf.max_iters=3", "unknown key 'train_cgf' .*did you mean 'train_cfg'"),
        ("train_cfg.max_itres=3", "unknown key 'max_itres' in train_cfg; did you mean 'max_iters'"),
        ("trian_cfg=3", "unknown key 'trian_cfg' in the config; did you mean 'train_cfg'"),
        ("train_dataloader.batchsize=3", "unknown key 'batchsize' in train_dataloader; did you mean 'batch_size'"),
        ("model.augment.0.mirrow=1", "unknown key 'mirrow' in model.augment.0; did you mean 'mirror'"),
        ("model.augment.9.mirror=1", "unknown key '9'"),
        ("model.augment.9=1", "unknown key '9'"),
        ("model.augment.mirror=1", "unknown key 'mirror'"),
        ("score.mean=1", "unknown key 'mean'"),
        ("optim_wrapper.optimizer.wieght_decay=0", "did you mean 'weight_decay'"),
    ],
)
def test_a_misspelt_key_is_named_with_the_known_ones(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(UNET, [override])


def test_a_misspelt_key_in_a_file_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("train_cfgs = dict(max_iters=3)\n")
    with pytest.raises(ValueError, match=r"unknown key 'train_cfgs' in the config; did you mean 'train_cfg'"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (UNET, "model.net.out_channels=5", r"has 7 classes \(background, hippocampus, .*out_channels is for 5,"),
        ("medical/deep_grey_basic_unet", "model.net.out_channels=2", "model.net.out_channels is for 2,"),
        (
            "medical/brats_umamba",
            "prepare.0.classes=5",
            r"has 4 classes .* prepare\.0\.classes is for 5, .*; change that, or classes",
        ),
        ("medical/acdc_umamba", "test_evaluator.1.structures=('a',)", "test_evaluator.1.structures is for 2,"),
        (
            "medical/synapse_umamba",
            "classes=('a', 'b')",
            r"has 3 classes \(background, a, b\), but model\.net\.out_channels is for 9, "
            r"train_dataloader\.dataset\.items\.classes is for 9, ",
        ),
        ("video/acdc_cine_unet", "model.net.net.out_channels=6", "model.net.net.out_channels is for 6,"),
    ],
)
def test_classes_that_do_not_fit_the_network_are_named(name, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(name, [override])


def test_outputs_that_a_network_has_by_default_are_counted(tmp_path):
    file = tmp_path / "mine.py"
    config = load_config("medical/deep_grey_basic_unet")
    del config.model.net["out_channels"]
    config.dump(file)
    with pytest.raises(ValueError, match=r"model\.net\.out_channels is for 2,"):
        load_config(str(file))


def test_a_dumped_config_builds_the_same(tmp_path):
    config = load_config(UNET)
    config.dump(tmp_path / "dumped.py")
    again = load_config(str(tmp_path / "dumped.py"))
    nets = [build(one.model.net) for one in (config, again)]
    assert [p.shape for p in nets[0].parameters()] == [p.shape for p in nets[1].parameters()]
    assert type(build(again.model.loss)) is type(build(config.model.loss))


def test_objects_are_built_innermost_first():
    config = Config({"outer": {"type": "builtins.dict", "inner": {"type": "pathlib.PurePath"}, "many": [1, {"a": 2}]}})
    assert build(config.outer) == {"inner": Path(), "many": [1, {"a": 2}]}
