"""What the README says works as it stands: its Python runs, its commands parse, its table of models is the registry."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import vision_ssm
from vision_ssm.tools.__main__ import COMMANDS, tool_of
from vision_ssm.tools.__main__ import main as vision_ssm_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = "vssm1_tiny_0230s_ckpt_epoch_264.pth"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


COMMAND_LINES = [line for block in blocks("shell") for line in block.splitlines()]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1])
def test_python_runs_as_it_stands(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if CHECKPOINT in code:  # stands in for the authors' release; tests of the converter read their layout
        torch.save(timm.create_model("vmamba_tiny").state_dict(), CHECKPOINT)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_checkpoint_is_the_one_of_the_registry() -> None:
    assert timm.get_pretrained_cfg("vmamba_tiny").url.endswith(f"/{CHECKPOINT}")


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("vision-ssm")])
def test_commands_of_the_package_parse(line: str) -> None:
    """Parses the line with its own parser; the tests of the tools run the commands."""
    _, command, *arguments = shlex.split(line)
    assert command in COMMANDS
    tool_of(command).parser().parse_args(arguments)


def test_every_line_is_covered() -> None:
    """A line of another kind needs a test of its own."""
    kinds = ("vision-ssm ", "make ", "pip install ", "python3 -m venv ", ".venv/bin/")
    assert COMMAND_LINES
    assert [line for line in COMMAND_LINES if not line.startswith(kinds)] == []


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("make")])
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_extras_are_those_of_the_package() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    sentence = README.split("The extras are")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE))


def test_table_of_models_is_the_registry() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", README, flags=re.MULTILINE))
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
