"""Fixtures of every test: seeds, NaN-filled allocations, devices and golden files."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any test imports one

ROOT = Path(__file__).parents[1]
# `python -m pytest` puts the checkout there, and transformers would take our folder kernels/ for the package `kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
PARITY = ROOT.parent / "shared" / "parity"
FIXTURES = ROOT / "tests" / "fixtures"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, each group in its own order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills uninitialised floating tensors with NaN, so that reading one before writing it cannot pass by luck.

    Deterministic mode fills in the allocator itself: operators written in C++ and ``new_empty`` are covered too.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of the golden outputs of the official implementations, kept beside the repository."""
    if not PARITY.is_dir():
        pytest.skip(f"the golden files are not beside this checkout: {PARITY.parent.name}/{PARITY.name}")
    return PARITY


@pytest.fixture(scope="session")
def golden_file() -> Callable[[str], Path]:
    """Finds a golden file by its name, such as "ops/ss2d/vmamba_gated_nhwc.npz".

    All of them are beside the repository, where it is developed; a few small ones travel with the tests.
    """

    def find(name: str) -> Path:
        for folder in (PARITY, FIXTURES):
            if (folder / name).is_file():
                return folder / name
        return pytest.skip(f"{name} is neither beside this checkout nor among the files that travel with it")

    return find


@pytest.fixture(scope="session")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the config ``bands``: class c has the logit 10 (2 c x - c²), largest where x is nearest."""
    from vision_ssm.engine.checkpoint import save_weights

    net = torch.nn.Conv3d(1, 3, kernel_size=1)
    centres = torch.arange(3.0)
    with torch.no_grad():
        net.weight.copy_(20 * centres.view(3, 1, 1, 1, 1))
        net.bias.copy_(-10 * centres**2)
    path = tmp_path_factory.mktemp("bands") / "bands.safetensors"
    save_weights(path, net, config="bands", classes=("low", "high"), channels=1)
    return path
