"""Gradient checkpointing of the layers over time and of single maps: less is kept, nothing else changes."""

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.engine.benchmark.profile import kept_bytes
from vision_ssm.layers import TemporalStack
from vision_ssm.video import ConvLSTM, FrameTransformer, NextFrame, convs5_stack

STACKS = {
    "convs5": lambda: convs5_stack(8, state=8, layers=3, groups=2),
    "conv_lstm": lambda: TemporalStack(ConvLSTM(8) for _ in range(3)),
    "transformer": lambda: FrameTransformer(8, width=16, heads=2, layers=3, patch=2),
}


@pytest.fixture(params=STACKS)
def model(request):
    return NextFrame(STACKS[request.param](), dim=8, encoder=(32, 32), decoder=(32, 32))


def test_checkpointing_changes_nothing(model, monkeypatch):
    monkeypatch.setattr("vision_ssm.video.next_map.AT_ONCE", 4)  # so that pieces differ in length
    model.double()
    clip = torch.rand(2, 5, 1, 8, 12, dtype=torch.float64)
    state = model(clip[:, :1])[1]
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        frames, last = model(clip[:, 1:], state=[m.detach() for m in state])
        (frames.square().mean() + sum(m.square().mean() for m in last)).backward()
        found.append([frames, *last, *(p.grad for p in model.parameters())])
    for plain, again in zip(*found, strict=True):
        assert_close(plain, again)


def test_little_is_kept(model, monkeypatch):
    monkeypatch.setattr("vision_ssm.video.next_map.AT_ONCE", 4)
    clip, u = torch.rand(2, 8, 1, 16, 16), torch.randn(8, 2, 8, 8, 8)
    whole, layers = kept_bytes(model, clip), kept_bytes(model.stack, u)
    model.set_grad_checkpointing()
    assert kept_bytes(model, clip) < whole / 8
    assert kept_bytes(model.stack, u) < layers / 2
    model.set_grad_checkpointing(False)
    assert (kept_bytes(model, clip), kept_bytes(model.stack, u)) == (whole, layers)


@torch.no_grad()
def test_rollouts_do_not_care(model):
    clip = torch.rand(1, 3, 1, 8, 8)
    wanted = model.generate(clip, 2)[0]
    model.set_grad_checkpointing()
    assert_close(model.generate(clip, 2)[0], wanted)
