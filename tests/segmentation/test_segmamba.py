"""SegMamba's own parts: its three orders, the gate of its convolutions, the weighting of its skips."""

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.layers.mamba import AlongRoute
from vision_ssm.segmentation import SegMamba
from vision_ssm.segmentation.segmamba import GatedConvolution, weigh_by_certainty


def segmamba(**arguments):
    return SegMamba(3, 1, 3, **{"dims": (4, 6), "depths": (1, 2), "hidden": 8, "state": 2, **arguments})


def test_every_mamba_reads_the_volume_in_three_orders():
    net = segmamba()
    for stage, depth in zip(net.stages, (1, 2), strict=True):
        orders = [module for module in stage.modules() if isinstance(module, AlongRoute)]
        assert len(orders) == 3 * depth
        for ahead, back, across in zip(*[iter(orders)] * 3, strict=True):
            assert ahead.order == back.order == [0, 1, 2, 3, 4]
            assert back.direction.scan.routes[0].reverse and not ahead.direction.scan.routes[0].reverse
            assert across.order == [0, 2, 3, 1, 4]  # from slice to slice at each pixel


def test_the_arrangement_of_the_release_has_fewer_convolutions():
    paper, release = segmamba(depths=(2, 2)), segmamba(depths=(1, 1), mambas=2)

    def count(net, kind):
        return sum(isinstance(module, kind) for module in net.modules())

    assert count(paper, AlongRoute) == count(release, AlongRoute) == 12
    assert count(paper, GatedConvolution) == 2 * count(release, GatedConvolution) == 4


def test_a_convolution_is_gated_by_a_pointwise_one():
    gated = GatedConvolution(3, 4).eval()
    x = torch.randn(1, 4, 3, 4, 5)
    assert_close(gated(x), x + gated.fuse(gated.around(x) * gated.gate(x)))
    assert gated.around.conv.kernel_size == gated.fuse.conv.kernel_size == (3, 3, 3)
    assert gated.gate.conv.kernel_size == (1, 1, 1)


def test_certain_cells_weigh_more():
    mean = torch.tensor([-40.0, -0.5, 0.0, 3.0, 40.0])
    x = (mean + torch.tensor([[-1.0], [1.0]]))[None]  # two channels with that mean
    p = torch.sigmoid(mean.double())
    weight = 2 + torch.nan_to_num(p * p.log())
    assert_close(weigh_by_certainty(x), x * weight.float())
    assert weigh_by_certainty(x.half()).isfinite().all()


@pytest.mark.parametrize("name", ["dims", "depths"])
def test_stages_need_both_width_and_depth(name):
    with pytest.raises(ValueError, match="an entry of at least 1 for each stage"):
        segmamba(**{name: (4, 4, 4)})


def test_other_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="an entry of at least 1 for each stage"):
        segmamba(depths=(0, 1))
    with pytest.raises(ValueError, match="mambas must be at least 1; mixer='identity'"):
        segmamba(mambas=0)
