"""Public names stay: what users and checks outside the repository import and create."""

import re
from itertools import product
from pathlib import Path

import pytest
import timm

import vision_ssm

DOCUMENT = Path(__file__).parents[2] / "shared" / "design" / "api.md"


@pytest.fixture(scope="module")
def document() -> str:
    if not DOCUMENT.is_file():
        pytest.skip("the list of public names is not here")
    return DOCUMENT.read_text(encoding="utf-8")


def expanded(pattern: str) -> list[str]:
    """Names of a pattern such as "a_{b,c}"."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in product(*parts)]


def test_imports(document: str) -> None:
    lines = re.findall(r"^from vision_ssm.* import [\w, ]+", document, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        exec(line, {})


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_models(document: str) -> None:
    paragraph = document.partition("Model names in timm:")[2].partition("test_*")[0]
    names = [name for pattern in re.findall(r"`([\w{},]+)`", paragraph) for name in expanded(pattern)]
    assert len(names) > 20
    for name in names:
        assert timm.create_model(name, device="meta").num_classes == 1000


def test_older_names_are_no_models_of_their_own() -> None:
    with pytest.warns(UserWarning, match="hydra_vit_base_patch16_224 to current hydra_vit_base"):
        model = timm.create_model("hydra_vit_base_patch16_224", num_classes=3, device="meta")
    assert model.pretrained_cfg["architecture"] == "hydra_vit_base" and model.num_classes == 3
    assert "hydra_vit_base_patch16_224" not in vision_ssm.list_models()
