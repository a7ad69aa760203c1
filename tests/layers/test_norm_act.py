"""A norm and its activation in one call are what they are one after the other."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.layers import norm_act as module
from vision_ssm.layers.convs5_outputs import GELU, ResNetOutput
from vision_ssm.video.next_frame import Doubling, ResNetUnit

ACTIVATIONS = {"gelu_tanh": GELU(), "elu": nn.ELU(), None: nn.SiLU()}
OTHERS = {"exact GELU": nn.GELU(), "another ELU": nn.ELU(alpha=0.5), "none": nn.Identity()}


@pytest.fixture
def fused(monkeypatch):
    """The activations that were fused, by calls of the operator as it runs on a GPU."""
    seen = []

    def group_norm_act(x, groups, weight, bias, *, eps, activation):
        seen.append(activation)
        return torch.ops.vision_ssm.group_norm_act(x, groups, weight, bias, eps, activation)[0]

    monkeypatch.setattr(module, "group_norm_act", group_norm_act)
    return seen


def trained(function, x, *modules):
    """The output and all gradients, with norms that are not at their first weights."""
    torch.manual_seed(0)
    parameters = [p for m in modules for p in m.parameters()]
    for p in parameters:
        nn.init.normal_(p)
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), (x, *parameters))


def maps(*shape):
    return (2 * torch.randn(shape, dtype=torch.float64) + 1).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "act"), [*ACTIVATIONS.items(), *((None, act) for act in OTHERS.values())], ids=str)
def test_equals_the_two_in_turn(name, act, fused):
    norm, x = nn.GroupNorm(3, 12, eps=1e-5).double(), maps(2, 12, 4, 5)
    have = trained(lambda x: module.norm_act(norm, act, x), x, norm)
    assert_close(have, trained(lambda x: act(norm(x)), x, norm), rtol=1e-10, atol=1e-10)
    assert fused == ([name] if name else [])


@pytest.mark.parametrize("out", [32, 64])
def test_the_unit_is_its_parts_in_turn(out, fused):
    unit, x = ResNetUnit(32, out).double(), maps(2, 32, 3, 4)
    have = trained(unit, x, unit)
    assert_close(have, trained(lambda x: unit.skip(x) + 0.1 * unit.inner(x), x, unit), rtol=1e-9, atol=1e-9)
    assert fused == ["elu", "elu"]


def test_the_output_block_is_its_parts_in_turn(fused):
    block, y = ResNetOutput(8, groups=2).double(), maps(2, 8, 3, 4)

    def in_turn(y):
        inner = block.conv1(block.act(block.norm1(y)))
        return block.act(y + block.conv2(block.act(block.norm2(inner))))

    assert_close(trained(lambda y: block(y, y), y, block), trained(in_turn, y, block), rtol=1e-9, atol=1e-9)
    assert fused == ["gelu_tanh", "gelu_tanh"]


def test_doubled_maps_keep_their_dtype_and_layout():
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = Doubling()(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_doubled_maps_and_gradients_are_pytorchs():
    x = maps(2, 3, 4, 5)
    assert_close(trained(Doubling(), x), trained(nn.UpsamplingNearest2d(scale_factor=2), x), rtol=1e-12, atol=1e-12)
