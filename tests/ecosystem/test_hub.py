"""``hubconf.py``: torch.hub finds every model in a checkout, installed or not, without a network."""

import inspect
import site
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import vision_ssm

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in vision_ssm.list_models() if not name.startswith("test_")]


def load(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A name under which torch.hub finds the checkout among its downloads; it lists no local folders."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner_vision_ssm_main").symlink_to(ROOT)
    return {"github": "owner/vision_ssm:main", "skip_validation": True, "trust_repo": True}


def test_every_model_is_listed_and_nothing_else(cached):
    assert sorted(torch.hub.list(**cached)) == PUBLIC


def test_entry_points_have_help_and_take_pretrained(cached):
    helps = {name: torch.hub.help(model=name, **cached) for name in PUBLIC}
    assert helps["vmamba_tiny"].startswith("VMamba-T")
    assert all(helps.values()) and len(set(helps.values())) == len(PUBLIC)
    for name in PUBLIC:
        assert inspect.signature(timm.model_entrypoint(name)).parameters["pretrained"].default is False


def test_a_model_is_that_of_timm():
    model, twin = load("vmamba_nano", num_classes=7).eval(), timm.create_model("vmamba_nano", num_classes=7).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 48, 40)
    assert_close(model(x), twin(x))


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_nano"):
        load("vmamba_nano", pretrained=True)


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_will_do(tmp_path):
    """In an interpreter that ignores the installed package: -S leaves out its .pth file."""
    code = (
        f"import sys; sys.path += {site.getsitepackages()}\n"
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'vmamba_nano', source='local', num_classes=5).eval()\n"
        "import vision_ssm.kernels, vision_ssm.model_zoo\n"
        "print(vision_ssm.kernels.__file__, tuple(model(torch.randn(1, 3, 32, 32)).shape))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{ROOT / 'kernels' / '__init__.py'} (1, 5)"
