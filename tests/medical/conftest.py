"""Fixtures of data sets, each made once."""

from collections.abc import Callable
from pathlib import Path

import data_sets
import numpy as np
import pytest


@pytest.fixture(scope="session")
def small_brain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return data_sets.small_brain()


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory, small_brain: tuple[np.ndarray, ...]) -> Callable[[str], Path]:
    """Folder of the data set in a layout; tests that change it copy it first."""
    made: dict[str, Path] = {}

    def find(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("data") / layout
            data_sets.LAYOUTS[layout](made[layout], *small_brain)
        return made[layout]

    return find
