"""Costs of models: multiply-adds as published, memory kept, and the command that prints them."""

import pytest
import timm
import torch
from torch import nn

import vision_ssm  # noqa: F401  registers the models
from vision_ssm.engine.benchmark.profile import count_multiply_adds, kept_bytes
from vision_ssm.tools.__main__ import main


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vmamba_tiny", 4.906e9),
        ("vmamba_small", 8.716e9),
        ("vmamba_base", 15.359e9),
        ("vmamba_tiny_v0", 5.627e9),
        ("vim_tiny", 1.823e9),
        ("vim_small", 5.912e9),
        ("vim_tiny_stride8", 6.755e9),
    ],
)
def test_multiply_adds_are_the_published_ones(name, published):
    with torch.device("meta"):
        total, scanned = count_multiply_adds(timm.create_model(name).eval(), torch.empty(1, 3, 224, 224))
    assert abs(total / published - 1) < 0.01
    assert 0 < scanned < 0.5 * total


def test_the_control_has_no_scan():
    with torch.device("meta"):
        total, scanned = count_multiply_adds(
            timm.create_model("vim_tiny", mixer="identity").eval(), torch.empty(1, 3, 224, 224)
        )
    assert total > 0 and scanned == 0


def test_kept_bytes_are_those_of_activations():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x = torch.randn(5, 4)
    assert kept_bytes(net, x) == 4 * (5 * 4 + 5 * 8)  # the input, and the output of the ReLU for it and the layer after


def test_the_command_prints_a_table(capsys, monkeypatch):
    """Of models that are built for one size, too; its headings are whole where a name is long."""
    monkeypatch.setenv("COLUMNS", "80")
    sizes = ["--size", "64", "--seconds", "0.01", "--device", "cpu"]
    assert main(["profile", "test_vmamba", "test_vit", "swin_tiny_patch4_window7_224", *sizes]) == 0
    shown = capsys.readouterr().out
    words = ["Multiply-adds", "test_vmamba", "test_vit", "swin_tiny_patch4_window7_224"]
    assert all(word in shown for word in (*words, "params", "mult-adds", "scans", "kept", "infer", "step"))


def test_time_is_needed(capsys):
    assert main(["profile", "test_vmamba", "--seconds", "0", "--device", "cpu"]) == 2
    assert "seconds must be positive; got 0" in capsys.readouterr().err


def test_unknown_model_says_so(capsys):
    assert main(["profile", "vmamba_huge", "--device", "cpu"]) == 2
    assert "Unknown model (vmamba_huge)" in capsys.readouterr().err
