"""VMUNet and SwinUMamba with weights of VMamba: all that have a counterpart arrive, or there is an error."""

import json

import pytest
import safetensors.torch
import timm
import torch

from vision_ssm import model_zoo
from vision_ssm.segmentation.swin_umamba import SwinUMamba
from vision_ssm.segmentation.vm_unet import VMUNet

ONE = {"depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1)}  # the smallest VMamba has one block in most stages
NETWORKS = {"VMUNet": (VMUNet, ONE), "SwinUMamba": (SwinUMamba, {})}


@pytest.fixture(params=NETWORKS)
def network(request):
    """Makes the network on the smallest VMamba."""
    cls, smaller = NETWORKS[request.param]
    return lambda in_channels=3, **arguments: cls(
        2, in_channels, 4, **{"backbone": "test_vmamba", **smaller, **arguments}
    )


def weights(**arguments):
    """A state dict of the smallest VMamba with random values in place of the ones and zeros of a new model."""
    state = timm.create_model("test_vmamba", **{"num_classes": 7, **arguments}).state_dict()
    return {key: torch.randn_like(value) for key, value in state.items()}


def saved(path, state):
    safetensors.torch.save_file(state, path)
    return path


def loaded(net):
    """Names of the weights of the net that have a counterpart, with the counterpart's name."""
    names = {name: name for name in net.state_dict() if name.startswith("stages.")}
    if isinstance(net, VMUNet):
        names |= {name: name for name in net.state_dict() if name.startswith("stem.")}
        places = {"deepest.": "stages.3.", **{f"decoder.up.{i}.stage.": f"stages.{2 - i}." for i in range(3)}}
        for place, source in places.items():
            names |= {
                name: name.replace(place, source) for name in net.state_dict() if name.startswith(f"{place}blocks.")
            }
    return names


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_weight_with_a_counterpart_arrives(network, suffix, tmp_path):
    state = weights()
    path = tmp_path / f"vmamba.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        saved(path, state)
    net = network(pretrained=path)
    found, names = net.state_dict(), loaded(net)
    assert len(names) > 50
    assert all(torch.equal(found[name], state[source]) for name, source in names.items())
    blocks = {key for key in state if key.startswith("stages.") and (".blocks.0." in key or "downsample" in key)}
    assert blocks <= set(names.values())


def test_what_has_no_counterpart_is_as_drawn(network, tmp_path):
    path = saved(tmp_path / "vmamba.safetensors", weights())
    with_weights, new = network(pretrained=str(path)), network()
    rest = new.state_dict().keys() - loaded(new).keys()
    assert {key.split(".")[0] for key in rest} <= {"stem", "patch_embed", "skips", "decoder"}
    assert not any("mixer" in key for key in rest)
    assert with_weights.state_dict().keys() == new.state_dict().keys()


def test_the_patch_embedding_is_adapted_to_the_channels(tmp_path):
    state = weights()
    net = VMUNet(2, 1, 4, backbone="test_vmamba", pretrained=saved(tmp_path / "vmamba.safetensors", state), **ONE)
    torch.testing.assert_close(net.stem[0].weight, state["stem.0.weight"].sum(1, keepdim=True))


def test_a_file_of_as_many_channels_and_without_classifier_fits(network, tmp_path):
    state = weights(in_chans=1, num_classes=0)
    net = network(1, pretrained=saved(tmp_path / "vmamba.safetensors", state))
    assert all(torch.equal(net.state_dict()[name], state[source]) for name, source in loaded(net).items())


def test_the_authors_file_is_converted_from_a_path_and_from_timm_s_cache(parity, tmp_path, monkeypatch):
    """As published: VMamba-T in the layout of February 2024, with wider scans and no MLP."""
    facts = json.loads((parity / "vmamba_tiny_v0.json").read_text())
    official = {entry["key"]: torch.full(entry["shape"], float(i)) for i, entry in enumerate(facts["params"])}
    path = tmp_path / "hub" / "checkpoints" / timm.get_pretrained_cfg("vmamba_tiny_v0").url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save({"model": official}, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = model_zoo.convert(official, "vmamba_tiny_v0")
    stages = [key for key in ours if key.startswith("stages.")]
    for pretrained in (path, True):
        found = SwinUMamba(2, 1, 2, pretrained=pretrained).state_dict()
        assert stages and all(torch.equal(found[key], ours[key]) for key in stages)


def test_asking_timm_for_weights_that_do_not_exist_is_an_error(network):
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_vmamba"):
        network(pretrained=True)


def test_a_file_that_lacks_or_adds_a_weight_is_refused(network, tmp_path):
    state = weights()
    del state["stages.2.blocks.1.mixer.scan.A_log"]
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.2\.blocks\.1\.mixer\.scan\.A_log"):
        network(pretrained=saved(tmp_path / "less.safetensors", state))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stages\.9"):
        network(pretrained=saved(tmp_path / "more.safetensors", {**weights(), "stages.9": torch.ones(1)}))


def test_the_twin_takes_no_weights_of_an_ssm(network, tmp_path):
    path = saved(tmp_path / "vmamba.safetensors", weights())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scan\.A_log"):
        network(mixer="identity", pretrained=path)
    network(mixer="identity", pretrained=saved(tmp_path / "twin.safetensors", weights(mixer="identity")))


def test_files_that_hold_no_weights_are_refused(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth"):
        network(pretrained=tmp_path / "absent.pth")
    half = saved(tmp_path / "half.safetensors", weights())
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        network(pretrained=half)
    with pytest.raises(ValueError, match=r"empty\.safetensors holds no weights"):
        network(pretrained=saved(tmp_path / "empty.safetensors", {}))


def test_more_blocks_than_there_are_weights_for_are_refused(tmp_path):
    path = saved(tmp_path / "vmamba.safetensors", weights())
    for more in ({"depths": (1, 2, 1, 1)}, {"decoder_depths": (1, 1, 2, 1)}):
        with pytest.raises(ValueError, match=r"fewer blocks than .*stages\.1\.blocks\.1\.norm1\.weight"):
            VMUNet(2, 3, 4, backbone="test_vmamba", pretrained=path, **{**ONE, **more})
