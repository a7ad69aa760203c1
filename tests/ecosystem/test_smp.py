"""segmentation_models_pytorch: its ``tu-`` encoders on the hierarchical backbones, its DPT on the plain ones."""

import pytest
import timm
import torch
from torch.testing import assert_close

import vision_ssm

smp = pytest.importorskip("segmentation_models_pytorch")

PLAIN = ["test_hydra", "test_vim"]
HIERARCHICAL = [name for name in vision_ssm.list_models("test_*") if name not in PLAIN]


def encoder(name, **arguments):
    return smp.encoders.get_encoder(f"tu-{name}", **{"weights": None} | arguments)


def without_gradient(net):
    return [key for key, parameter in net.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_maps_have_the_exact_strides(name, depth):
    """smp fills the level at 1/2, which these backbones do not have, with a map of no channels."""
    net = encoder(name, depth=depth)
    maps = net(torch.randn(1, 3, 64, 64))
    assert [tuple(fmap.shape) for fmap in maps] == [
        (1, channels, 64 // 2**level, 64 // 2**level) for level, channels in enumerate(net.out_channels)
    ]
    assert len(maps) == depth + 1 and net.output_stride == 2**depth
    assert net.out_channels[:2] == [3, 0] and all(net.out_channels[2:])


@pytest.mark.parametrize("depth", [0, 6])
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_other_depths_are_refused(name, depth):
    with pytest.raises(ValueError, match=f"depth .* got {depth}"):
        encoder(name, depth=depth)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_any_number_of_input_channels(name, channels):
    net = encoder(name, in_channels=channels).train()
    sum(fmap.square().sum() for fmap in net(torch.randn(2, channels, 32, 32))[1:]).backward()
    assert not without_gradient(net)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_dilation_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no dilated form.*got output_stride=16"):
        encoder(name, output_stride=16)
    with pytest.raises(ValueError, match="got output_stride=8"):
        smp.DeepLabV3(f"tu-{name}", encoder_weights=None)
    assert timm.create_model(name, features_only=True, output_stride=32).feature_info.reduction()[-1] == 32


@pytest.mark.parametrize("name", vision_ssm.list_models("test_*"))
def test_weights_that_do_not_exist_are_an_error(name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)
    if name in HIERARCHICAL:
        with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
            encoder(name, weights=True)


def test_compiles_and_exports():
    """One backbone stands for all: tests/backbones/test_backbones.py compiles and exports each of them."""
    net = encoder("test_vmamba").eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="eager")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for image in (x, torch.randn(1, 3, 96, 64)):
            assert_close(compiled(image), net(image))
        assert_close(torch.export.export(net, (x,), strict=True).module()(x), net(x))


@pytest.mark.parametrize(
    ("network", "size"),
    [("Unet", (75, 50)), ("FPN", (64, 96)), ("UPerNet", (64, 96))],  # smp itself wants multiples of 32 but for Unet
    ids=["Unet", "FPN", "UPerNet"],
)
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_networks_train(name, network, size):
    net = getattr(smp, network)(f"tu-{name}", encoder_weights=None, in_channels=2, classes=3).train()
    logits = net(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (2, *size))).backward()
    assert not without_gradient(net)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert all(parameter.grad.any() for parameter in net.encoder.model.stem_0.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_plain_backbones_are_for_dpt(name):
    """Maps of one scale are no pyramid. The class token of Vim is no prefix, so DPT is told to leave tokens out."""
    with pytest.raises(ValueError, match="downsampling"):
        encoder(name)
    narrow = {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16}
    net = smp.DPT(f"tu-{name}", encoder_weights=None, decoder_readout="ignore", in_channels=2, classes=3, **narrow)
    for size in ((64, 96), (160, 160)):
        assert net.eval()(torch.randn(1, 2, *size)).shape == (1, 3, *size)
    net.train()(torch.randn(2, 2, 64, 64)).square().mean().backward()
    unused = ("encoder.model.norm.", "encoder.model.head.")  # what comes after the last block
    assert all(key.startswith(unused) for key in without_gradient(net))
