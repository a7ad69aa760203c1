"""MONAI's FlexibleUNet on VMamba: what its own tests ask of an encoder, and the maps themselves."""

import io

import pytest
import timm
import torch
from monai.networks import eval_mode
from monai.networks.blocks import BaseEncoder
from monai.networks.nets import FLEXUNET_BACKBONE, FlexibleUNet, FlexUNetEncoderRegister
from torch.testing import assert_close

from vision_ssm.segmentation import VMambaEncoder, VolumeEncoder

NAMES = VMambaEncoder.get_encoder_names()


def network(backbone="test_vmamba", **arguments):
    return FlexibleUNet(**{"in_channels": 3, "out_channels": 2, "backbone": backbone} | arguments)


def test_every_model_with_a_map_at_half_the_resolution_is_registered():
    vmambas = set(timm.list_models(module="vmamba"))
    assert vmambas - set(NAMES) == {"vmamba_tiny_v0", "vmamba_small_v0", "vmamba_base_v0"}  # patches of 4 x 4
    assert set(NAMES) <= vmambas & set(FLEXUNET_BACKBONE.register_dict)


@pytest.mark.parametrize("encoder", [VMambaEncoder, VolumeEncoder])
def test_registration_agrees_with_the_class(encoder):
    assert issubclass(encoder, BaseEncoder)
    register = FlexUNetEncoderRegister()
    register.register_class(f"vision_ssm.segmentation.{encoder.__name__}")
    columns = encoder.num_outputs(), encoder.num_channels_per_output(), encoder.get_encoder_parameters()
    for name, *row in zip(encoder.get_encoder_names(), *columns, strict=True):
        entry = register.register_dict[name]
        assert [entry["feature_number"], entry["feature_channel"], entry["parameter"]] == row
        assert entry["feature_number"] == len(entry["feature_channel"]) == 5


def test_parameters_are_new_in_every_call():
    """FlexibleUNet writes into those that it was registered with."""
    first, second = VMambaEncoder.get_encoder_parameters(), VMambaEncoder.get_encoder_parameters()
    first[0]["in_channels"] = 99
    assert second == VMambaEncoder.get_encoder_parameters() and second[0]["in_channels"] == 3
    network(in_channels=1)
    assert network(in_channels=4)(torch.randn(2, 4, 32, 32)).shape == (2, 2, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_what_is_registered(name):
    at = NAMES.index(name)
    with torch.device("meta"):
        encoder = VMambaEncoder(**VMambaEncoder.get_encoder_parameters()[at])
        maps = encoder(torch.empty(1, 3, 64, 96))
    assert [tuple(fmap.shape) for fmap in maps] == [
        (1, channels, 64 // 2**level, 96 // 2**level)
        for level, channels in enumerate(VMambaEncoder.num_channels_per_output()[at], start=1)
    ]


@pytest.mark.parametrize("size", [(64, 96), (75, 63)], ids=str)
def test_maps_are_those_of_the_backbone(size):
    """The coarser four are timm's; the first is where the stem passes from its first convolution to its second."""
    encoder = VMambaEncoder(2, 3, False, "test_vmamba").eval()
    backbone = timm.create_model("test_vmamba").eval()
    backbone.load_state_dict(encoder.state_dict(), strict=False)
    x = torch.randn(2, 3, *size)
    wanted = [backbone.stem[:3](x), *backbone.forward_intermediates(x, intermediates_only=True)]
    for level, (found, fmap) in enumerate(zip(encoder(x), wanted, strict=True), start=1):
        assert_close(found, fmap[..., : size[0] // 2**level, : size[1] // 2**level])


@pytest.mark.parametrize("upsample", ["nontrainable", "deconv", "pixelshuffle"])
@pytest.mark.parametrize(("in_channels", "out_channels", "size"), [(1, 10, 64), (3, 20, 32), (8, 10, 96)])
def test_shape(upsample, in_channels, out_channels, size):
    net = network(in_channels=in_channels, out_channels=out_channels, upsample=upsample)
    with eval_mode(net):
        assert net(torch.randn(1, in_channels, size, size)).shape == (1, out_channels, size, size)


@pytest.mark.parametrize("size", [(32, 32), (66, 34), (100, 40), (75, 63)], ids=str)
def test_padding_takes_any_size(size):
    """As with MONAI's EfficientNet, an odd side comes back one pixel shorter: its decoder doubles the map at 1/2."""
    net = network()
    with eval_mode(net):
        maps = net.encoder(torch.randn(1, 3, *size))
        logits = net(torch.randn(1, 3, *size))
    assert [tuple(fmap.shape[-2:]) for fmap in maps] == [tuple(side >> level for side in size) for level in range(1, 6)]
    assert logits.shape == (1, 2, *(side - side % 2 for side in size))


def test_without_padding_multiples_of_32_fit():
    net = network(is_pad=False)
    with eval_mode(net):
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


def test_it_trains():
    net = network(in_channels=1).train()
    net(torch.randn(2, 1, 64, 64)).square().mean().backward()
    assert not [key for key, parameter in net.named_parameters() if parameter.grad is None]
    assert net.encoder.stem[0].weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|save|load).* is deprecated")
@torch.jit.optimized_execution(False)
@pytest.mark.parametrize(
    ("backbone", "size"), [("test_vmamba", (32, 66)), ("ssm3d_nano", (32, 34, 32))], ids=["image", "volume"]
)
def test_a_saved_script_computes_the_same(backbone, size):
    narrow = {"spatial_dims": len(size), "in_channels": 1, "decoder_channels": (8, 8, 8, 8, 4)}
    net = network(backbone, **narrow).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    script = torch.jit.load(file)
    with torch.no_grad():
        for sizes in (size, (35, *size[1:])):
            x = torch.randn(1, 1, *sizes)
            assert_close(script(x), net(x))


@pytest.mark.slow
def test_compiles_and_exports():
    """The encoder; the decoder asks torch.jit.isinstance, which Dynamo does not trace."""
    encoder = network().encoder.eval()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="eager")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for image in (x, torch.randn(1, 3, 98, 67)):
            assert_close(compiled(image), encoder(image))
        assert_close(torch.export.export(encoder, (x,)).module()(x), encoder(x))


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="test_vmamba is a network for images, spatial_dims=2; got spatial_dims=3"):
        network(spatial_dims=3)
    with pytest.raises(ValueError, match="invalid model_name vmamba_tiny_v0"):
        network("vmamba_tiny_v0")
    with pytest.raises(ValueError, match=r"unknown backbone 'vmamba_tiny_v0'.* vmamba_tiny,"):
        VMambaEncoder(2, 3, False, "vmamba_tiny_v0")
    with pytest.raises(ValueError, match="need at least 32 x 32 cells; got 31 x 64"):
        network()(torch.randn(1, 3, 31, 64))


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_vmamba"):
        network(pretrained=True)


def test_pretrained_weights_arrive(tmp_path, monkeypatch):
    """From timm's cache, where the authors' file would be after its download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.device("meta"):
        shapes = timm.create_model("vmamba_tiny").state_dict()
    wanted = {key: torch.randn(value.shape) for key, value in shapes.items()}
    file = tmp_path / "hub" / "checkpoints" / timm.get_pretrained_cfg("vmamba_tiny").url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(wanted, file)
    found = VMambaEncoder(spatial_dims=2, in_channels=1, pretrained=True, backbone="vmamba_tiny").state_dict()
    wanted["stem.0.weight"] = wanted["stem.0.weight"].sum(1, keepdim=True)
    assert wanted.keys() - found.keys() == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(found[key], wanted[key]) for key in found)


@pytest.mark.parametrize("name", VolumeEncoder.get_encoder_names())
def test_maps_of_volumes_are_what_is_registered(name):
    at = VolumeEncoder.get_encoder_names().index(name)
    with torch.device("meta"):
        encoder = VolumeEncoder(**VolumeEncoder.get_encoder_parameters()[at])
        maps = encoder(torch.empty(1, 1, 35, 64, 47))
    assert [tuple(fmap.shape) for fmap in maps] == [
        (1, channels, 35 >> level, 64 >> level, 47 >> level)
        for level, channels in enumerate(VolumeEncoder.num_channels_per_output()[at], start=1)
    ]


@pytest.mark.parametrize(("upsample", "size"), [("nontrainable", (32, 32, 32)), ("deconv", (32, 48, 34))])
def test_volumes(upsample, size):
    net = network("ssm3d_nano", spatial_dims=3, in_channels=2, decoder_channels=(8, 8, 8, 8, 4), upsample=upsample)
    with eval_mode(net):
        assert net(torch.randn(1, 2, *size)).shape == (1, 2, *size)
    net(torch.randn(2, 2, 32, 32, 32)).square().mean().backward()
    assert not [key for key, parameter in net.named_parameters() if parameter.grad is None]


def test_wrong_arguments_of_volumes_say_what_is_accepted():
    with pytest.raises(ValueError, match="ssm3d_nano is a network for volumes, spatial_dims=3; got spatial_dims=2"):
        network("ssm3d_nano")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ssm3d_nano"):
        network("ssm3d_nano", spatial_dims=3, pretrained=True)
    with pytest.raises(ValueError, match="unknown backbone of volumes 'vmamba_tiny'; there are ssm3d_nano"):
        VolumeEncoder(3, 1, False, "vmamba_tiny")
    with pytest.raises(ValueError, match="need at least 32 x 32 x 32 cells; got 32 x 31 x 64"):
        VolumeEncoder(3, 1, False, "ssm3d_nano")(torch.randn(1, 1, 32, 31, 64))
