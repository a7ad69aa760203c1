"""What the README says holds: each of its Python blocks runs by itself, its table of models is the registry.

tests/test_documented_commands.py runs its commands.
"""

import re
from pathlib import Path

import pytest
import timm
import torch
from documents import README, ROOT, blocks
from official_files import official

import vision_ssm
from vision_ssm.tools.__main__ import COMMANDS
from vision_ssm.tools.__main__ import main as vision_ssm_command

TEXT = README.read_text(encoding="utf-8")
PYTHON = [block.code for block in blocks(README) if block.language == "python"]
CHECKPOINT = "vssm1_tiny_0230s_ckpt_epoch_264.pth"


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1])
def test_python_runs_as_it_stands(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if CHECKPOINT in code:  # stands in for the authors' release
        torch.save({"model": official("vmamba_tiny", classes=1000)}, CHECKPOINT)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_checkpoint_is_the_one_of_the_registry() -> None:
    assert timm.get_pretrained_cfg("vmamba_tiny").url.endswith(f"/{CHECKPOINT}")


def test_extras_are_those_of_the_package() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    sentence = TEXT.split("The extras are")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE))


def test_table_of_models_is_the_registry() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", TEXT, flags=re.MULTILINE))
    assert list(table) == vision_ssm.list_models()
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in table}
    assert {name: float(text) for name, text in table.items()} == {
        name: round(n / 1e6, 1) for name, n in counts.items()
    }


def test_the_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vision_ssm_command(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
