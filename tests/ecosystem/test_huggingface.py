"""Hugging Face, offline: folders that timm writes and reads, and the two wrappers of transformers for timm models."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import vision_ssm

transformers = pytest.importorskip("transformers")

MODELS = vision_ssm.list_models("test_*")
PLAIN = ["test_hydra", "test_vim"]
HIERARCHICAL = [name for name in MODELS if name not in PLAIN]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def images(channels=3):
    return torch.randn(2, channels, 32, 32)


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A model of one channel and seven classes, and the folder that it is saved in."""
    model = timm.create_model(request.param, in_chans=1, num_classes=7).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    return model, tmp_path


def test_a_saved_folder_is_the_model(saved):
    """The folder knows its channels and classes."""
    model, folder = saved
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(channels=1)
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(again(x), model(x))
    assert again.pretrained_cfg["input_size"] == (1, 160, 160)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=3, num_classes=4)
    assert other(images()).shape == (2, 4)


def without_repetition(folder):
    """As older timm wrote it: where the arguments repeat the classes, transformers 5.24 passes them to timm twice."""
    config = json.loads((folder / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_transformers_reads_the_folder(saved):
    model, folder = saved
    folder = without_repetition(folder)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    assert isinstance(classifier, transformers.TimmWrapperForImageClassification)
    assert isinstance(backbone, transformers.TimmWrapperModel)
    x = images(channels=1)
    features, maps = model.forward_intermediates(x)
    assert_close(classifier(x).logits, model(x))
    found = backbone(x, output_hidden_states=True)
    assert_close(found.last_hidden_state, features)
    assert_close(found.pooler_output, model.forward_head(features, pre_logits=True))
    assert_close(list(found.hidden_states), maps)
    assert_close(list(backbone(x, output_hidden_states=[0, 2]).hidden_states), [maps[0], maps[2]])
    assert_close(list(classifier(x, output_hidden_states=True).hidden_states), maps)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_trains_saves_and_loads(name, tmp_path):
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=3)
    model = transformers.TimmWrapperForImageClassification(config)
    assert model.supports_gradient_checkpointing
    model.timm_model.set_grad_checkpointing()
    model.train()(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    x = images()
    assert_close(again(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("indices", [None, [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_timm_backbone(name, indices):
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone=name, out_indices=indices)).eval()
    x = images()
    maps = backbone(x).feature_maps
    reductions = [backbone._backbone.feature_info.info[i]["reduction"] for i in indices or [-1]]
    assert [tuple(fmap.shape) for fmap in maps] == [
        (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)
        for channels, reduction in zip(backbone.channels, reductions, strict=True)
    ]
    assert len(backbone.stage_names) == 4


@pytest.mark.parametrize("name", PLAIN)
def test_hidden_states_of_timm_backbone(name):
    """Plain backbones only: of any timm model in stages, transformers looks for stages.0, and timm says stages_0."""
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    found = transformers.TimmBackbone(config).eval()(images(), output_hidden_states=True)
    assert_close(found.hidden_states, found.feature_maps)
    assert [tuple(state.shape) for state in found.hidden_states] == [(2, 32, 2, 2)] * 4


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_dilation_is_refused(name):
    with pytest.raises(ValueError, match="got output_stride=16"):
        transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone=name, output_stride=16))


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_do_not_exist_are_an_error(name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        transformers.TimmBackbone.from_pretrained(name)


@pytest.mark.slow
def test_transformers_works_in_a_checkout():
    """It looks for a package named as our folder is, which stands first on its path there."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from transformers import TimmWrapperModel\n"
        "from transformers.utils import is_kernels_available\n"
        "import transformers.integrations.hub_kernels, kernels\n"
        "print(is_kernels_available(), kernels.__version__)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "0"]
