"""UMamba's own parts: where Mamba is, what nnU-Net plans, how it begins."""

import math

import pytest
import torch

from vision_ssm.segmentation import UMamba
from vision_ssm.segmentation.umamba import CellMixer

# As nnU-Net plans 3-D abdominal MRI: thick slices, which the first two stages leave alone.
PLAN = {
    "channels": (4, 6, 8, 10),
    "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "blocks": (1, 2, 3, 1),
    "decoder_blocks": (2, 1, 1),
}


def umamba(spatial_dims=3, **arguments):
    return UMamba(spatial_dims, 1, 3, **{"channels": (4, 6, 8), "state": 2, **arguments})


def test_mamba_ends_the_coarsest_stage_or_every_stage():
    bottleneck, encoder = umamba(), umamba(form="encoder")
    assert [isinstance(stage[-1], CellMixer) for stage in bottleneck.encoder] == [False, False, True]
    assert [isinstance(stage[-1], CellMixer) for stage in encoder.encoder] == [True, True, True]
    assert not any(isinstance(module, CellMixer) for module in bottleneck.decoder.modules())


def test_a_plan_of_nnunet():
    net = umamba(**PLAN, deep_supervision=True)
    assert [len(stage) for stage in net.encoder] == [1, 2, 3, 2]
    assert [len(up.blocks) for up in net.decoder.up] == [1, 1, 2]  # coarsest first
    kernels = [stage[0].conv1.conv.kernel_size for stage in net.encoder]
    assert kernels == list(PLAN["kernel_sizes"])
    logits = net(torch.randn(1, 1, 5, 24, 40))
    assert [tuple(level.shape[2:]) for level in logits] == [(5, 24, 40), (5, 12, 20), (5, 6, 10)]


def test_no_weight_depends_on_the_size_of_the_patch():
    net = umamba(form="encoder").eval()
    shapes = {name: weight.shape for name, weight in net.state_dict().items()}
    for sizes in ((8, 8, 8), (4, 20, 12)):
        assert net(torch.randn(1, 1, *sizes)).shape[2:] == sizes
    assert {name: weight.shape for name, weight in net.state_dict().items()} == shapes


def test_deep_supervision_may_be_switched_as_nnunet_does():
    net = umamba(deep_supervision=True).train()
    image = torch.randn(1, 1, 8, 8, 8)
    assert len(net(image)) == 2
    net.decoder.deep_supervision = False
    assert net(image).shape == (1, 3, 8, 8, 8)


def test_convolutions_begin_as_nnunet_has_them():
    weight = umamba(channels=(32, 64)).encoder[1][1].conv2.conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.01**2) / (64 * 27)), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "decoder"}, "unknown form 'decoder'; the forms are bottleneck, encoder"),
        ({"channels": (4,)}, r"at least two stages; got channels=\(4,\)"),
        ({"strides": (1, 2)}, r"strides must be .* each of 3 stages"),
        ({"strides": (1, (2, 2), 2)}, r"strides must be .* each of 3 axes"),
        ({"strides": 2}, "strides must be 1 in the first stage"),
        ({"strides": (1, 2, 3)}, "1 or 2 in the others"),
        ({"kernel_sizes": (3, 2, 3)}, "kernel_sizes must be odd"),
        ({"kernel_sizes": 0}, "kernel_sizes must be a number of at least 1"),
        ({"blocks": (2, 0, 2)}, "blocks must be a number of at least 1"),
        ({"decoder_blocks": (2, 2, 2)}, "decoder_blocks must be .* each of 2 stages"),
    ],
    ids=str,
)
def test_wrong_arguments_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        umamba(**arguments)
