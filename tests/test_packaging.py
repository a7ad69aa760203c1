"""The wheel, the sdist and the editable install hold all of the tree that they should, and nothing else."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.tools.__main__ import COMMANDS, tool_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow  # builds, and fresh interpreters that import torch

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
MAPPED = [folder for folder in FOLDERS.values() if folder != "vision_ssm"]
LEFT_BEHIND = shutil.ignore_patterns(".*", "_build", "_generated", "build", "dist", "runs", "*.egg-info", "__pycache__")


def packages_of_the_tree() -> set[str]:
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    return found


def installed_names(*patterns: str) -> set[str]:
    """Where the files of the tree that match a pattern stand inside the wheel."""
    return {
        "/".join((*package.split("."), *path.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
        if "__pycache__" not in path.parts
    }


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a clone has it: without environments, caches and earlier builds."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "repository", ignore=LEFT_BEHIND))


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that was built out of that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    succeeds(python("-m", "build", "--no-isolation", "--outdir", str(folder), cwd=checkout))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_pyproject_lists_every_package() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_of_the_tree()
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


def test_every_folder_with_code_is_a_package() -> None:
    """Editable installs do not find namespace packages inside a package."""
    for folder in FOLDERS.values():
        for source in (ROOT / folder).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), f"{source.parent.relative_to(ROOT)} has no __init__.py"


def test_wheel_holds_the_code_under_one_name(wheel_names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"vision_ssm"}
    assert {name for name in wheel_names if name.endswith(".py")} == installed_names("*.py")


def test_wheel_holds_the_data_files(wheel_names: set[str]) -> None:
    expected = installed_names("brain_deep_grey/*", "*.yaml", "py.typed")
    assert {"vision_ssm/py.typed", "vision_ssm/data/brain_deep_grey/colin27_t1.nii.gz"} <= expected
    assert expected <= wheel_names


def test_wheel_holds_the_licences(wheel_names: set[str]) -> None:
    licences = {name.rsplit("/", 1)[1] for name in wheel_names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_wheel_of_the_tree_equals_the_wheel_of_the_sdist(checkout: Path, wheel_names: set[str], tmp_path: Path) -> None:
    succeeds(python("-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), cwd=checkout))
    (direct,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(direct).namelist()) == wheel_names


def test_sdist_has_no_tests(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    present = {path.name for path in unpacked.iterdir()}
    assert {"CHANGELOG.md", "LICENSE", "NOTICE", "README.md", *FOLDERS.values()} <= present
    assert "tests" not in present


def test_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    succeeds(python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path))
    code = (
        "import vision_ssm, importlib, importlib.resources as resources\n"
        f"for name in {sorted(FOLDERS)}: print(importlib.import_module(name).__file__)\n"
        "print(resources.files('vision_ssm.configs').joinpath('medical', '__init__.py'))"
    )
    locations = succeeds(python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))).splitlines()
    assert len(locations) == len(FOLDERS) + 1
    assert all(Path(location).is_file() and Path(location).is_relative_to(target) for location in locations)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Program ``vision-ssm`` of a new environment: the wheel alone, and the libraries that this one has.

    A path file names their folder. Path files in that folder are not read, so the editable install is not there.
    """
    folder = tmp_path_factory.mktemp("environment")
    succeeds(python("-m", "venv", "--without-pip", str(folder), cwd=folder))
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = folder.rglob("site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    target = ("--python", str(scripts / Path(sys.executable).name))
    succeeds(python("-m", "pip", *target, "install", "--quiet", "--no-deps", str(wheel), cwd=folder))
    return scripts / "vision-ssm"


def runs(program: Path, *arguments: str, cwd: Path) -> str:
    return succeeds(subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True))


CONFIG = "medical/deep_grey_vmamba_unet"


@pytest.fixture(scope="module")
def trained(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights after one step."""
    folder = tmp_path_factory.mktemp("trained")
    short = ("train_cfg.max_iters=1", "train_dataloader.batch_size=1")
    runs(installed, "train", CONFIG, "--work-dir", "run", "--set", *short, cwd=folder)
    return folder / "run" / "weights.safetensors"


def test_the_environment_has_the_package_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import vision_ssm, vision_ssm.kernels as kernels; print(vision_ssm.__file__, kernels.__file__)"
    for location in runs(installed.with_name(Path(sys.executable).name), "-c", code, cwd=tmp_path).split():
        assert Path(location).is_relative_to(installed.parents[1])


def test_the_wheel_predicts_by_the_name_of_a_config(installed: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copyfile(deep_grey_files()[0]["image"], tmp_path / "in.nii.gz")
    runs(installed, "predict", CONFIG, str(trained), "in.nii.gz", "out.nii.gz", cwd=tmp_path)
    assert (tmp_path / "out.nii.gz").is_file()


def test_the_wheel_exports_by_the_name_of_a_config(installed: Path, trained: Path, tmp_path: Path) -> None:
    target = ("--checkpoint", str(trained), "--out", "net.pt2")
    runs(installed, "export", CONFIG, "--to", "pt2", "--fixed", *target, cwd=tmp_path)
    assert (tmp_path / "net.pt2").is_file()


def test_editable_install_works_from_elsewhere(checkout: Path, tmp_path: Path) -> None:
    """Builds the editable wheel and reads its .pth file, in an interpreter that ignores the installed package."""
    build = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    succeeds(python("-c", build, cwd=checkout))
    (editable,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(editable).extractall(tmp_path / "site")
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r}); sys.path += {site.getsitepackages()}\n"
        f"import importlib\nfor name in {sorted(FOLDERS)}: print(importlib.import_module(name).__file__)"
    )
    locations = succeeds(python("-S", "-c", code, cwd=tmp_path)).splitlines()
    assert [Path(location).parent for location in locations] == [checkout / FOLDERS[name] for name in sorted(FOLDERS)]


@pytest.mark.parametrize("folder", MAPPED)
def test_the_bare_name_of_a_mapped_folder_gives_nothing(folder: str) -> None:
    done = python("-c", f"from {folder} import load", cwd=ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert f"vision_ssm.{folder}" in done.stderr.splitlines()[-1]


def test_looking_for_the_package_kernels_in_a_checkout_finds_it_or_nothing(tmp_path: Path) -> None:
    """A library that looks for it lives on: it finds what is installed beside the checkout, or a version of 0."""
    probe = (
        "import importlib.util, sys, kernels; assert importlib.util.find_spec('kernels')\n"
        "print(kernels.__version__, 'torch' in sys.modules, hasattr(kernels, '__nothing__'))\n"
    )
    assert succeeds(python("-c", probe, cwd=ROOT)).split() == ["0", "False", "False"]
    assert "No module named 'kernels.routes'" in python("-c", "import kernels.routes", cwd=ROOT).stderr
    installed = tmp_path / "kernels"
    installed.mkdir()
    (installed / "__init__.py").write_text("from .routes import get_kernel\n__version__ = '7.1'\n")
    (installed / "routes.py").write_text("def get_kernel(): return __name__\n")
    probe += "from kernels import get_kernel, routes; print(get_kernel(), routes.__file__)"
    found = succeeds(python("-c", probe, cwd=ROOT, PYTHONPATH=str(tmp_path))).split()
    assert found == ["7.1", "False", "False", "kernels.routes", str(installed / "routes.py")]


def test_a_checkout_that_is_not_installed_says_what_to_do(checkout: Path) -> None:
    code = f"import sys; sys.path += {site.getsitepackages()}; import vision_ssm"
    done = python("-S", "-c", code, cwd=checkout)
    assert done.returncode != 0
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "pip install -e ." in done.stderr.splitlines()[-1]


def test_tools_run_as_scripts(checkout: Path) -> None:
    """``python tools/train.py`` does the same as ``vision-ssm train``."""
    scripts = [ROOT / "tools" / Path(str(tool_of(command).__file__)).name for command in COMMANDS]
    code = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, script\n"
        "    else: raise AssertionError(f'{script} --help did not end with SystemExit')"
    )
    output = succeeds(python("-c", code, *map(str, scripts), cwd=checkout.parent))
    for command in COMMANDS:
        assert f"usage: vision-ssm {command}" in output
