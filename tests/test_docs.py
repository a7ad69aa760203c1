"""The documentation works as it stands: the blocks of a page run in their order, as a reader goes through them.

Python blocks of a page share their names, and all blocks share a folder. Commands of the package run too, with training
made short. What cannot run here is listed in ``ELSEWHERE``.
"""

import doctest
import importlib.util
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import timm
import torch
from nbclient import NotebookClient

import vision_ssm
from vision_ssm.backbones import FAMILIES
from vision_ssm.layers import RoutedScan
from vision_ssm.tools import __main__ as cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = {"_build", "_generated"}
DOCUMENTS = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in DOCUMENTS if not MADE & set(page.parts)]
FENCE = re.compile(r"^```(?P<language>[\w-]+)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)

SHORT = ("train_cfg.max_iters=2", "train_cfg.val_interval=2", "train_dataloader.batch_size=2")
DIGITS = ("val_dataloader.dataset.clips=1", "val_dataloader.dataset.frames=10", "test_dataloader.dataset.clips=2")
SMALL = {
    ("train", "medical/decathlon_umamba"): (
        "model.net.channels=(4,8,8)",
        "model.net.decoder_blocks=1",
        "model.net.state=2",
        "train_dataloader.dataset.size=(16,16,16)",
        "model.inferer.roi_size=(16,16,16)",
    ),
    ("train", "video/moving_digits_convs5_nano"): (*DIGITS, "param_scheduler.0.end=1", "param_scheduler.1.begin=1"),
    ("eval", "video/moving_digits_convs5_nano"): DIGITS,
}
"""Entries of a config that are changed for the time that its network or its test takes on a CPU."""

ELSEWHERE = {
    "make ": "CI runs the targets lint, docs and test; dev installs; demo is the command quickstart",
    "vision-ssm quickstart": "tests/test_tools.py runs it, and the commands that it prints",
    "vision-ssm train video/acdc_cine_unet": "tests/video/test_cine.py takes a step of it on files that it makes",
    "vision-ssm eval video/acdc_cine_unet": "tests/video/test_clip_tools.py scores cines that it makes",
    "vision-ssm predict video/acdc_cine_unet": "tests/video/test_clip_tools.py labels cines that it makes",
    "vision-ssm train video/moving_digits_heading": "tests/video/test_clip_classifier.py takes a step of it",
    "vision-ssm predict video/moving_digits_heading": "tests/video/test_clip_tools.py classifies clips that it makes",
    "vision-ssm train video/folder_convs5": "tests/video/test_video_tools.py trains it on videos that it writes",
    "vision-ssm train video/moving_digits_vq_nano": "tests/video/test_video_codes.py trains both, made small",
    "vision-ssm train video/moving_digits_codes_nano": "as above",
    "pip install ": "needs a package index; tests/test_packaging.py installs the wheel",
}
"""How lines begin that do not run here, and why."""


COMMAND = re.compile(r"(?:.* -m vision_ssm\.tools|vision-ssm) (.*)")


class Block(NamedTuple):
    """A fenced block of a page, and the line that it begins on."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        yield Block(fence["language"], fence["code"], text.count("\n", 0, fence.start("code")))


def logical_lines(block: Block) -> list[str]:
    """Lines of a shell, those that a backslash continues put together."""
    return re.sub(r"\\\n\s*", "", block.code).splitlines()


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    exec(compile("\n" * block.line + block.code, page, "exec"), names)


def run_doctest(block: Block, page: Path, names: dict[str, object]) -> None:
    example = doctest.DocTestParser().get_doctest(block.code, names, page.stem, str(page), block.line)
    doctest.DebugRunner().run(example, clear_globs=False)
    names.update(example.globs)


def run_shell(block: Block, page: Path, names: dict[str, object]) -> None:
    for line in logical_lines(block):
        if line.startswith(tuple(ELSEWHERE)):
            continue
        program, *arguments = shlex.split(line)
        assert program == "vision-ssm", f"{page.name}: no test runs {line!r}"
        assert cli.main(shortened(arguments)) == 0, line


def shortened(arguments: list[str]) -> list[str]:
    """A command as it stands, but of training two steps, and small where the network or the test is large."""
    entries = [*(SHORT if arguments[0] == "train" else ()), *SMALL.get((arguments[0], arguments[1]), ())]
    return [*arguments, *([] if "--set" in arguments or not entries else ["--set"]), *entries]


RUN = {"python": run_python, "pycon": run_doctest, "shell": run_shell}
SHOWN = {"text", "toml", "json"}


def parameter(page: Path) -> object:
    """Pages with commands train, and take longer."""
    marks = [pytest.mark.slow] if any(block.language == "shell" for block in blocks(page)) else []
    return pytest.param(page, marks=marks, id=page.relative_to(ROOT).with_suffix("").as_posix())


@pytest.mark.parametrize("page", [parameter(page) for page in PAGES if any(b.language in RUN for b in blocks(page))])
def test_blocks_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language not in SHOWN:
            RUN[block.language](block, page, names)


NOT_RUN = [
    line
    for page in PAGES
    for block in blocks(page)
    for line in logical_lines(block)
    if block.language in SHOWN or line.startswith(tuple(ELSEWHERE))
]


@pytest.mark.parametrize("command", sorted({found[1] for line in NOT_RUN if (found := COMMAND.match(line))}))
def test_commands_that_do_not_run_parse(command: str) -> None:
    """Those after torchrun too."""
    name, *arguments = shlex.split(command)
    cli.tool_of(name).parser().parse_args(arguments)


def test_every_language_is_run_or_only_shown() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert {"python", "pycon", "shell"} <= languages <= {*RUN, *SHOWN}


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    lines = [line for page in PAGES for block in blocks(page) for line in block.code.splitlines()]
    named = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {"demo", "dev"} <= named <= targets


def test_every_family_of_models_has_a_page() -> None:
    """A new family of models needs a page."""
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


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """The extension of the site that makes figures and tables."""
    path = DOCS / "extensions" / "generated.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["efficient_vmamba", "vim", "vim2", "vmamba"])
def test_figures_show_the_routes_of_the_models(generated: ModuleType, family: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"test_{family}")
    routes, grid = generated.FIGURES[family]
    scans = [part for part in model.modules() if isinstance(part, RoutedScan) and len(part.routes[0].axes) == 2]
    if family == "vim":  # scans tokens, each direction by itself
        first = model.get_submodule("blocks.0.mixer").modules()
        scans = [part for part in first if isinstance(part, RoutedScan)]
        ways = [part.routes[0].index((math.prod(grid),)).tolist() for part in scans]
        assert ways == [route.index(grid).tolist() for route in routes]
    else:
        assert scans and all(part.routes == routes for part in scans)


@pytest.mark.parametrize("name", ["efficient_vmamba", "vim", "tri", "vim2_channels"])
def test_lines_of_a_figure_follow_the_route(generated: ModuleType, name: str) -> None:
    routes, grid = generated.FIGURES[name]
    panels = generated.figure_of_routes(routes, grid).axes
    for panel, route in zip(panels, routes, strict=True):
        (lines,) = panel.collections[1:2]
        drawn = np.array(lines._segments3d if len(grid) == 3 else lines.get_segments())
        cells = np.stack(np.unravel_index(route.index(grid).numpy(), grid), axis=1)[:, ::-1]
        assert np.array_equal(drawn[0, 0, : len(grid)], cells[0])
        assert np.array_equal(drawn[:, 1, : len(grid)], cells[1:])


def test_table_of_a_family_is_the_registry(generated: ModuleType) -> None:
    rows = [line.split(" | ") for line in generated.table_of_models("efficient_vmamba").splitlines()[2:]]
    assert [row[0].strip("| `") for row in rows] == vision_ssm.list_models("*efficient_vmamba*")
    smallest = timm.create_model("test_efficient_vmamba", features_only=True)
    maps = smallest(torch.randn(1, 3, 64, 64))
    assert rows[-1][3] == ", ".join(str(one.shape[1]) for one in maps)
    assert rows[-1][4].strip(" |") == ", ".join(str(64 // one.shape[2]) for one in maps)


@pytest.mark.parametrize(("limit", "verdict"), [(1e9, "met"), (1e-9, "missed")])
def test_a_target_is_met_or_missed(
    generated: ModuleType, monkeypatch: pytest.MonkeyPatch, limit: float, verdict: str
) -> None:
    monkeypatch.setattr(generated, "TARGETS", dict.fromkeys(generated.TARGETS, limit))
    rows = generated.table_of_targets().splitlines()[2:-1]
    assert len(rows) == len(generated.TARGETS)
    monkeypatch.setattr(generated, "IMAGES_PER_S", 1 / limit)
    monkeypatch.setattr(generated, "TIMES_SWIN", limit)
    rows += generated.table_of_model_targets().splitlines()[2:]
    assert all(row.rstrip("| ").split(" | ")[-1].startswith(verdict) for row in rows)
