"""Each command end to end, and how it fails."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.engine.config import config_names, load_config
from vision_ssm.tools import __main__ as cli
from vision_ssm.tools import quickstart, train

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "fixtures" / "tiny_unet.py")
BRAIN = deep_grey_files()[0]["image"]


def refused(capsys, *arguments: object) -> str:
    """The one line that a failing command writes."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vision-ssm: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "run"
    assert cli.main(["train", TINY, "--work-dir", str(folder), "--set", "train_cfg.max_iters=2"]) == 0
    return folder


def test_train_eval_and_predict(run, tmp_path, capsys):
    for checkpoint in ("weights.safetensors", "iter_2.pth"):
        assert cli.main(["eval", TINY, str(run / checkpoint), "--out", str(tmp_path / "scores.json")]) == 0
        assert "dice/mean" in capsys.readouterr().out
        assert "hd95/caudate" in json.loads((tmp_path / "scores.json").read_text())["means"]
    target = tmp_path / "labels.nii.gz"
    command = ["predict", TINY, str(run / "weights.safetensors"), BRAIN, str(target)]
    assert cli.main(command) == 0
    assert target.is_file()
    assert "--overwrite" in refused(capsys, *command)
    assert cli.main([*command, "--overwrite"]) == 0


def test_train_resumes_and_refuses(run, capsys):
    again = ["train", TINY, "--work-dir", run, "--set", "train_cfg.max_iters=3"]
    assert "--resume" in refused(capsys, *again)
    assert cli.main([*map(str, again[:4]), "--resume", *again[4:]]) == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 3


def test_changes_add_up(tmp_path, capsys):
    """Those behind an earlier ``--set`` hold beside those behind a later one."""
    twice = ["--set", "train_cfg.max_itres=1", "--set", "train_cfg.val_interval=2"]
    assert "max_iters" in refused(capsys, "train", TINY, "--work-dir", tmp_path / "run", *twice)


def test_bad_input_is_one_line_and_status_2(run, tmp_path, capsys):
    (tmp_path / "text.nii.gz").write_text("no image")
    weights = run / "weights.safetensors"
    assert config_names()[0] in refused(capsys, "train", "medical/nothing")
    assert "max_iters" in refused(capsys, "train", TINY, "--set", "train_cfg.max_itres=1")
    assert "another model" in refused(capsys, "eval", "medical/deep_grey_basic_unet", weights)
    assert "no such checkpoint" in refused(capsys, "eval", TINY, tmp_path / "absent.pth")
    assert "no such volume" in refused(capsys, "predict", TINY, weights, tmp_path / "a.nii", tmp_path / "b.nii")
    assert "NIfTI" in refused(capsys, "predict", TINY, weights, tmp_path / "text.nii.gz", tmp_path / "b.nii")
    assert not (tmp_path / "b.nii").exists()
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, "train", TINY, "--work-dir", tmp_path / "file" / "run")
    assert "unknown backbone" in refused(
        capsys, "train", TINY, "--work-dir", tmp_path / "new", "--set", "model.net.backbone=vmamba_nanoo"
    )


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "medical/nothing", "--debug"])


def test_an_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(command in error for command in cli.COMMANDS)


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "main", interrupted)
    assert cli.main(["quickstart"]) == 130
    assert capsys.readouterr().err == "vision-ssm: interrupted\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"vision-ssm {command}" in capsys.readouterr().out.partition("Example")[2]


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("start", [["tools/train.py"], ["-m", "vision_ssm.tools.train"], ["-m", "vision_ssm.tools"]])
def test_tools_start_as_files_and_as_modules(start):
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "vision-ssm train" in done.stdout


def test_the_quickstart_takes_a_new_folder(tmp_path):
    assert quickstart.unused(tmp_path / "run").name == "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert quickstart.unused(tmp_path / "run").name == "run-3"


@pytest.mark.slow
def test_the_quickstart_and_the_commands_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    short = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "train_dataloader.batch_size=2"]
    folder = tmp_path / "demo"
    assert cli.main(["quickstart", "--work-dir", str(folder), "--set", *short]) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("SSM U-Net", "identity twin", "plain U-Net", "Dice thalamus"))
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Colin27" in page
    assert "http" not in page
    measured = json.loads((folder / "metrics.json").read_text())
    assert {title: len(one["losses"]) for title, one in measured["runs"].items()} == {
        "SSM U-Net": 2,
        "identity twin": 2,
        "plain U-Net": 2,
    }
    assert (folder / "report.png").is_file()
    assert "earlier run" in refused(capsys, "quickstart", "--work-dir", folder)

    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  vision-ssm ")]
    assert [command[1] for command in commands] == ["predict", "eval", "train", "train"]
    for _, name, *arguments in commands[:2]:
        assert cli.main([name, *arguments]) == 0
    for _, _, *arguments in commands[2:]:
        parsed = train.parser().parse_args(arguments)
        assert not parsed.work_dir.exists()
        load_config(parsed.config, parsed.set)
    assert (folder / "again.nii.gz").is_file()
