"""Maps over time stay as they lie: no scan and no layer has to move their channels."""

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.testing import assert_close

from vision_ssm.layers import TemporalStack, convs5
from vision_ssm.video import ConvLSTM, NextFrame, convs5_stack
from vision_ssm.video.next_frame import CellNorm


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scans_take_what_convolutions_give(weights, monkeypatch):
    seen = []
    scan = convs5.linear_scan

    def watched(a, b, **options):
        h, last = scan(a, b, **options)
        seen.append(b.is_contiguous() and h.is_contiguous())
        return h, last

    monkeypatch.setattr(convs5, "linear_scan", watched)
    model = NextFrame(convs5_stack(8, state=8, layers=2, groups=2), dim=8, encoder=(32, 32), decoder=(32, 32))
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=weights)
    model(torch.rand(2, 3, 1, 8, 12))
    assert seen == [True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_lstm_gathers_maps_as_they_lie(layout, monkeypatch):
    """By the input's layout, and with it the stack's, which is always channels-last."""
    seen = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda maps, **options: seen.append(maps) or stack(maps, **options))
    maps = torch.randn(6, 8, 4, 5).to(memory_format=layout)
    TemporalStack([ConvLSTM(8), ConvLSTM(8)])(maps.movedim(1, -1).unflatten(0, (3, 2)))
    hidden = [m for call in seen for m in call if m.shape == (2, 4, 5, 8)]
    assert len(hidden) == 2 * 3
    assert all(m.is_contiguous() for m in hidden)


def test_the_norm_of_cells_is_that_of_maps():
    ours, theirs = CellNorm(6, eps=1e-6), LayerNorm2d(6, eps=1e-6)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 6, 3, 5)
    assert_close(ours(x), theirs(x))
