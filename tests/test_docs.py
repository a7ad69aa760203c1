"""The documentation works as it stands: the blocks of a page run in their order, as a reader goes through them.

Python blocks of a page share their names, and all blocks share a folder. Commands of the package run too, with training
made short. What cannot run here is listed in ``ELSEWHERE``.
"""

import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient

from vision_ssm.tools import __main__ as cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = {"_build", "_generated"}
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if not MADE & set(page.relative_to(DOCS).parts)]
FENCE = re.compile(r"^```(?P<language>[\w-]+)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)

SHORT = ("train_cfg.max_iters=2", "train_cfg.val_interval=2", "train_dataloader.batch_size=2")
SMALL = {
    "medical/decathlon_umamba": (
        "model.net.channels=(4,8,8)",
        "model.net.decoder_blocks=1",
        "model.net.state=2",
        "train_dataloader.dataset.size=(16,16,16)",
        "model.inferer.roi_size=(16,16,16)",
    )
}
"""Entries of a config that are changed besides, for the time that its network takes on a CPU."""

ELSEWHERE = {
    "make ": "CI runs the targets lint, docs and test; demo is the command quickstart",
    "vision-ssm quickstart": "tests/test_tools.py runs it, and the commands that it prints",
    "pip install ": "needs a package index; tests/test_packaging.py installs the wheel",
}
"""How lines begin that do not run here, and why."""


class Block(NamedTuple):
    """A fenced block of a page, and the line that it begins on."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        yield Block(fence["language"], fence["code"], text.count("\n", 0, fence.start("code")))


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    exec(compile("\n" * block.line + block.code, page, "exec"), names)


def run_doctest(block: Block, page: Path, names: dict[str, object]) -> None:
    example = doctest.DocTestParser().get_doctest(block.code, names, page.stem, str(page), block.line)
    doctest.DebugRunner().run(example, clear_globs=False)
    names.update(example.globs)


def run_shell(block: Block, page: Path, names: dict[str, object]) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.startswith(tuple(ELSEWHERE)):
            continue
        program, *arguments = shlex.split(line)
        assert program == "vision-ssm", f"{page.name}: no test runs {line!r}"
        assert cli.main(shortened(arguments)) == 0, line


def shortened(arguments: list[str]) -> list[str]:
    """A command as it stands, but of training two steps, small where the network is large."""
    if arguments[0] != "train":
        return arguments
    entries = [*SHORT, *SMALL.get(arguments[1], ())]
    return [*arguments, *([] if "--set" in arguments else ["--set"]), *entries]


RUN = {"python": run_python, "pycon": run_doctest, "shell": run_shell}
SHOWN = {"text", "toml", "json"}


def parameter(page: Path) -> object:
    """Pages with commands train, and take longer."""
    marks = [pytest.mark.slow] if any(block.language == "shell" for block in blocks(page)) else []
    return pytest.param(page, marks=marks, id=page.relative_to(DOCS).with_suffix("").as_posix())


@pytest.mark.parametrize("page", [parameter(page) for page in PAGES if any(b.language in RUN for b in blocks(page))])
def test_blocks_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language not in SHOWN:
            RUN[block.language](block, page, names)


def test_every_language_is_run_or_only_shown() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert {"python", "pycon", "shell"} <= languages <= {*RUN, *SHOWN}


def test_every_family_of_models_has_a_page() -> None:
    """A new family of models needs a page."""
    from vision_ssm.backbones import FAMILIES

    assert {*FAMILIES, "convs5"} == {page.stem for page in (DOCS / "models").glob("*.md")}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    """With two steps of training in place of those that the cell tagged ``parameters`` says."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source, changed = re.subn(r"^STEPS = \d+$", "STEPS = 2", cell.source, flags=re.MULTILINE)
    assert changed == 1
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before a notebook is committed"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
