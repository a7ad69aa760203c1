"""What others wrote is not run: configs and overrides under --safe, and files that are downloaded."""

from pathlib import Path

import pytest

from vision_ssm.engine.config import build, config_names, load_config
from vision_ssm.tools import __main__ as cli

UNET = "medical/deep_grey_vmamba_unet"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, whose config writes the file ``ran`` when it is read, and a module that does."""
    for name in ("evil.py", "trap_module.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nscore = 'a'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", config_names())
def test_every_config_of_the_package_is_read(name: str) -> None:
    assert load_config(name, safe=True).model == load_config(name).model


def test_overrides_of_plain_data_are_accepted() -> None:
    overrides = [
        "train_cfg.max_iters=7",
        "log_processor={'window_size': 9}",
        "optim_wrapper.optimizer.weight_decay=0",
        "model.net.mixer=identity",
        "model.net.decoder_channels=(8, 16, 32, 64)",
        "model.augment.0.mirror=0.25",
        "train_dataloader.num_workers=2",
        "val_dataloader=None",
        "data_root=../My data/Task04-Hippocampus",
        "launcher=pytorch",
        "randomness={'seed': 3}",
        "default_hooks.watch.action=skip",
        "default_hooks.watch.limit=3",
    ]
    config = load_config(UNET, overrides, safe=True)
    assert config.train_dataloader.dataset == load_config(UNET, overrides).train_dataloader.dataset
    assert config.train_cfg.max_iters == 7
    assert config.log_processor.window_size == 9
    assert config.log_processor.by_epoch is False
    assert build(config.model.net).up is not None


@pytest.mark.parametrize(
    "name",
    ["evil.py", "./evil.py", "evil", "../configs/image/evil", "_base_/runtime", "medical/../medical/acdc_umamba", ""],
)
def test_a_config_outside_the_package_is_not_read(trap: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no config {name!r}; give one of: experiment/ct_abdomen, .*{UNET}"):
        load_config(name, safe=True)
    assert not (trap / "ran").exists()


def test_a_file_with_the_name_of_a_config_does_not_stand_in_for_it(trap: Path) -> None:
    (trap / "medical").mkdir()
    (trap / f"{UNET}.py").write_text((trap / "evil.py").read_text())
    assert load_config(f"{UNET}.py", safe=True).score == "dice/mean"
    assert not (trap / "ran").exists()
    assert load_config(f"{UNET}.py").score == "a"  # without --safe the file comes first
    assert (trap / "ran").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.net.type=os.system", "the key 'type' could bring code"),
        ("model.net.type='trap_module.score'", "the key 'type' could bring code"),
        ("model={'net': {'type': 'os.system'}}", "'type' could bring code"),
        ("model.augment=[{'type': 'os.system'}]", "'type' could bring code"),
        ("custom_hooks=[{'type': 'trap_module.score'}]", "'type' could bring code"),
        ("custom_imports={'imports': ['trap_module']}", "has no such entry"),
        ("default_scope=trap_module", "has no such entry"),
        ("env_cfg.dist_cfg={'backend': 'nccl'}", "unknown key 'env_cfg'"),
        ("optim_wrapper.constructor=trap_module.score", "nor an argument that is known by name"),
        ("train_cfg.max_iters=10**9", "neither a literal nor a plain word"),
        ("data_root=__import__('os').getcwd()", "neither a literal nor a plain word"),
        ("data_root=lambda x: x()", "neither a literal nor a plain word"),
        ("data_root={{ fileDirname }}", "neither a literal nor a plain word"),
        ("data_root='{{ $HOME:x }}'", "neither a literal nor a plain word"),
        ("data_root=$HOME", "neither a literal nor a plain word"),
        ("model.net={'_delete_': True, 'in_channels': 5}", "the key '_delete_' could bring code"),
        ("_base_=evil.py", "the key '_base_' could bring code"),
        ("model._scope_=trap_module", "the key '_scope_' could bring code"),
        ("model.loss=trap_module.score", "it describes an object"),
        ("model.net=5", "it describes an object"),
        ("prepare=[]", "it describes an object"),
        ("train_cfg.max_iters=b'1'", "is no number, string"),
        ("train_cfg.max_iters={1, 2}", "is no number, string"),
        ("train_cfg.max_iters=1j", "is no number, string"),
        ("train_cfg.max_iters=...", "is no number, string"),
        ("model.net.__class__=5", "the key '__class__' could bring code"),
        ("train-cfg.max_iters=5", "the key 'train-cfg' could bring code"),
        ("max_iters", "is not KEY=VALUE"),
        ("train_cfg.max_itres=3", "nor an argument that is known by name"),
    ],
)
def test_an_override_that_could_run_code_is_refused(trap: Path, override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("**", r"\*\*")) as error:
        load_config(UNET, [override], safe=True)
    key = override.partition("=")[0]
    assert key.split(".")[0] in str(error.value)
    assert not (trap / "ran").exists()


READERS = {
    "experiment": ["run", "evil.py", "--out", "runs.jsonl", "--seconds", "1"],
    "bundle": ["create", "evil.py", "weights.safetensors", "out"],
}


@pytest.mark.parametrize("command", READERS)
def test_commands_take_safe_and_say_what_a_config_is(
    trap: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = READERS[command]
    assert cli.main([command, *arguments, "--safe"]) == 2
    assert "no config 'evil.py'; give one of" in capsys.readouterr().err
    assert not (trap / "ran").exists()
    subcommand = arguments[:1] if command in ("experiment", "bundle") else []
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, *subcommand, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a config is Python and runs as code when it is read" in shown
