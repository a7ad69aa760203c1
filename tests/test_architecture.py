"""Imports point down: tools -> engine -> segmentation, data -> video, backbones -> layers -> kernels -> torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("configs", "kernels", "model_zoo", "tools")
INNER = ("backbones", "data", "engine", "layers", "nnunet", "segmentation", "video")

# What a folder may import of this package beside itself and the version.
ALLOWED = {
    "kernels": set(),
    "layers": {"kernels"},
    "model_zoo": set(),
    "backbones": {"kernels", "layers", "model_zoo"},
    "segmentation": {"kernels", "layers", "backbones", "video"},
    "video": {"kernels", "layers"},
    "nnunet": {"segmentation"},
    "data": {"kernels", "layers", "backbones"},
    "engine": {"kernels", "layers", "backbones", "segmentation", "video", "data", "model_zoo", "configs"},
    "configs": {"layers", "backbones", "segmentation", "video", "data", "engine"},
    "tools": {"engine", "segmentation", "video", "data", "backbones", "layers", "kernels", "model_zoo", "configs"},
}
# Libraries that belong to some folders only.
OWNERS = {
    "argparse": {"tools"},
    "einops": set(),
    "matplotlib": {"engine"},
    "mmengine": {"engine", "configs"},
    "monai": {"segmentation", "data", "engine", "configs"},
    "nibabel": {"data", "engine"},
    "nnunetv2": {"nnunet"},
    "rich": {"data", "engine", "tools"},
    "timm": {"layers", "model_zoo", "backbones", "segmentation", "video", "data", "engine", "configs", "tools"},
}


def folder(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "vision_ssm" and len(parts) > 2 else parts[0]


def package(path: Path) -> list[str]:
    """Dotted name, in parts, of the package that a file of the tree belongs to."""
    parts = path.relative_to(ROOT).parent.parts
    return list(parts) if parts[0] == "vision_ssm" else ["vision_ssm", *parts]


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute dotted names of all that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package(path)
            base = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


FILES = sorted(
    path
    for top in (*TOP, *(f"vision_ssm/{name}" for name in INNER))
    for path in (ROOT / top).rglob("*.py")
    if "__pycache__" not in path.parts
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = folder(path)
    reached = {parts[1] for module in imported_modules(path) if (parts := module.split("."))[0] == "vision_ssm"}
    unexpected = (reached & set(ALLOWED)) - ALLOWED[here] - {here}
    assert not unexpected, f"{here} must not import {', '.join(sorted(unexpected))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_with_their_owners(path: Path) -> None:
    libraries = {module.split(".")[0] for module in imported_modules(path)}
    misplaced = {library for library in libraries & set(OWNERS) if folder(path) not in OWNERS[library]}
    assert not misplaced, f"{', '.join(sorted(misplaced))} in {folder(path)}; allowed in {OWNERS}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_triton_stays_in_gpu_files(path: Path) -> None:
    uses_triton = any(module.split(".")[0] == "triton" for module in imported_modules(path))
    times_kernels = (
        path == ROOT / "vision_ssm" / "engine" / "benchmark" / "timing.py"
    )  # with triton.testing, on a GPU only
    assert not uses_triton or path.name.startswith("gpu") or times_kernels


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_mapped_folders_import_siblings_relatively(path: Path) -> None:
    if folder(path) in TOP and folder(path) != "tools":  # a tool is a script too, and scripts have no relative imports
        tree = ast.parse(path.read_text(encoding="utf-8"))
        absolute = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not [name for name in absolute if f"{name}.".startswith(f"vision_ssm.{folder(path)}.")]


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nobody_imports_a_mapped_folder_by_its_bare_name(path: Path) -> None:
    """The bare names are other projects'; ruff's TID251 cannot tell them from relative imports in these folders."""
    assert not {module.split(".")[0] for module in imported_modules(path)} & set(TOP)


def test_the_reader_sees_what_an_import_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "vision_ssm" / "layers" / "ss.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import torch\nfrom . import init\nfrom ..engine import runner\ndef f():\n    import vision_ssm.data.x\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert set(imported_modules(source)) == {
        "torch",
        "vision_ssm.layers.init",
        "vision_ssm.engine.runner",
        "vision_ssm.data.x",
    }


# Inside the engine: what its packages may import of one another, beside the modules at its root that lie below them.
ENGINE = {
    "training": set(),
    "benchmark": {"training"},
    "segmentation": {"training"},
    "video": {"training", "segmentation"},
    "experiment": {"benchmark", "training", "video"},
    "zoo": {"benchmark"},
    "export": set(),
}
ROOF = {"commands", "demo", "erf", "openmmlab", "report"}
"""Modules at the engine's root that use its packages; those below them use none."""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "vision_ssm" / "engine").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_engine_is_built_in_floors(path: Path) -> None:
    engine = ROOT / "vision_ssm" / "engine"
    room = path.relative_to(engine).with_suffix("").parts[0]
    reached = {
        parts[2] for name in imported_modules(path) if (parts := name.split("."))[:2] == ["vision_ssm", "engine"]
    }
    unknown = {child.name for child in engine.iterdir() if (child / "__init__.py").exists()} - set(ENGINE)
    assert not unknown, f"say in ENGINE what {', '.join(sorted(unknown))} may import"
    if room not in ROOF:
        unexpected = reached & (set(ENGINE) | ROOF) - ENGINE.get(room, set()) - {room}
        assert not unexpected, f"{room} must not import {', '.join(sorted(unexpected))}"
