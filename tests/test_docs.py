"""The site of the documentation: its notebooks run, its figures and tables show what the package has."""

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pytest
import timm
import torch
from documents import DOCS
from nbclient import NotebookClient

import vision_ssm
from vision_ssm.backbones import FAMILIES
from vision_ssm.layers import RoutedScan


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
    monkeypatch.setattr(generated, "IMAGES_PER_S", dict.fromkeys(generated.IMAGES_PER_S, 1 / limit))
    monkeypatch.setattr(generated, "TRAINING_MIB", limit)
    monkeypatch.setattr(generated, "TIMES_SWIN", dict.fromkeys(generated.TIMES_SWIN, limit))
    rows += generated.table_of_model_targets().splitlines()[2:]
    assert all(row.rstrip("| ").split(" | ")[-1].startswith(verdict) for row in rows)
