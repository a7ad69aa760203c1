"""The soak sees what it is there to see, on a CPU and at a tiny size; 2,000 steps are for a GPU."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vision_ssm.engine.benchmark import soak as module
from vision_ssm.engine.benchmark.soak import Soak, soak
from vision_ssm.tools import __main__ as cli

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"steps": 5, "sizes": (8, 24), "batch": 1, "device": CPU}


@pytest.fixture(scope="module")
def seen() -> Soak:
    return soak("test_vmamba", **TINY)


def test_a_short_soak_is_finite(seen: Soak) -> None:
    assert seen.not_finite == 0
    assert seen.distinct_sizes == 5
    assert all(math.isfinite(loss) for loss in seen.loss)
    assert sum(seen.graphs) == 0
    assert {len(value) for value in vars(seen).values() if isinstance(value, list)} == {4}


def test_the_network_is_compiled_for_all_sizes_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(net: nn.Module, **options: Any) -> nn.Module:
        asked.append(options)
        return net

    monkeypatch.setattr(torch, "compile", compiled)
    assert soak("test_vmamba", **TINY, compiled="aot_eager").compiled == "aot_eager"
    assert asked == [{"dynamic": True, "backend": "aot_eager"}]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"not_finite": 2}, "2 steps were not finite"),
        ({"memory_mib": [10.0, 80.0, 100.0, 103.0]}, "memory grew"),
        ({"graphs": [3, 0, 1, 0]}, "graphs were compiled after the first quarter"),
        ({"slow_steps": [0, 1, 1, 1]}, "steps became slow"),
    ],
)
def test_what_is_not_in_order_is_said(seen: Soak, changes: dict[str, Any], complaint: str) -> None:
    sound = replace(seen, memory_mib=[10.0, 80.0, 100.0, 101.0], slow_steps=[5, 0, 0, 0], graphs=[3, 0, 0, 0])
    assert sound.complaints() == []
    (found,) = replace(sound, **changes).complaints()
    assert complaint in found


def test_a_loss_that_is_not_finite_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.F, "cross_entropy", lambda logits, label: logits.sum() * math.nan)
    assert soak("test_vmamba", **TINY).not_finite == 5


def test_the_command_writes_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    options = ["--steps", "4", "--sizes", "8", "16", "--batch", "1", "--device", "cpu", "--out", str(out)]
    status = cli.main(["soak", "test_vmamba", *options])
    written = json.loads(out.read_text())
    assert status == bool(written["complaints"])
    assert written["steps"] == 4
    assert written["environment"]["torch"] == torch.__version__
    assert "memory_mib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"), [({"steps": 3}, "steps must be at least 4"), ({"sizes": (9, 8)}, "sizes must be")]
)
def test_other_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soak("test_vmamba", **{**TINY, **changes})
