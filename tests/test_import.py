"""``import vision_ssm`` is quick and leaves the optional libraries alone."""

import json
import subprocess
import sys

import pytest

SECONDS = 2.0
OPTIONAL = [
    "matplotlib",
    "mlxtend",
    "mmengine",
    "monai",
    "nibabel",
    "nnunetv2",
    "numba",
    "rich",
    "segmentation_models_pytorch",
    "transformers",
    "triton",
]
PROBE = """
import json, sys, time
import torch, timm
before, start = set(sys.modules), time.perf_counter()
import vision_ssm
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the import adds to torch and timm: seconds, and the top-level names of new modules."""
    away_from_the_checkout = tmp_path_factory.mktemp("import")
    probes = [
        json.loads(subprocess.check_output([sys.executable, "-c", PROBE], cwd=away_from_the_checkout)) for _ in range(2)
    ]
    return min(probes, key=lambda probe: probe["seconds"])  # the first one may have compiled the bytecode


def test_import_is_quick(added: dict) -> None:
    assert added["seconds"] < SECONDS


def test_optional_libraries_are_not_imported(added: dict) -> None:
    assert "vision_ssm" in added["modules"]
    assert not set(OPTIONAL) & set(added["modules"])
