"""``VSSMBackbone``, as mmengine builds it for mmdet, mmseg and mmpretrain: found by its prefix, not imported."""

import json
import random

import pytest
import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS, Registry
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import vision_ssm
from vision_ssm import model_zoo

LIBRARY = Registry("model", parent=MODELS, scope="a_library")
SMALLEST = vision_ssm.list_models("test_*")
PLAIN = ["test_hydra", "test_vim"]
STEM = {"test_vim": ("patch_embed.", "cls_token", "pos_embed"), "test_hydra": ("patch_embed.",)}

smallest = pytest.mark.parametrize("name", SMALLEST)


def build(name, **options):
    return LIBRARY.build({"type": "vision_ssm.VSSMBackbone", "model_name": name, **options})


def images(channels=3):
    return torch.linspace(-2, 2, 2 * channels * 32 * 48).sin().view(2, channels, 32, 48)


def without_gradient(module):
    return [key for key, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]


def filled(name, **options):
    """A model with values of its own in each tensor, batch norms' statistics too."""
    model = timm.create_model(name, **options)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("indices", [None, (0, -2)], ids=str)
@smallest
def test_maps_are_those_of_the_model(name, indices, tmp_path):
    model = filled(name, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    backbone = build(name, in_chans=1, out_indices=indices, pretrained=tmp_path / "model.pth")
    backbone.init_weights()
    x = images(1)
    maps = backbone.eval()(x)
    wanted = [0, 2] if indices else [3] if name in PLAIN else [0, 1, 2, 3]
    with torch.no_grad():
        assert_close(maps, tuple(model.forward_intermediates(x, indices=wanted, intermediates_only=True)))
    sum(fmap.sum() for fmap in maps).backward()
    assert not without_gradient(backbone)  # distributed training asks for no unused parameters


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
@smallest
def test_frozen_stages(name, frozen):
    """Training reaches all but the frozen part, whose modules and statistics stay as they are."""
    backbone = build(name, out_indices=(0, 1), frozen_stages=frozen, drop_path_rate=0.5, with_cp=True).train()
    parts = STEM.get(name, ("stem.",)) if frozen >= 0 else ()
    parts += tuple(f"{'blocks' if name in PLAIN else 'stages'}.{stage}." for stage in range(frozen))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.eval().train()
    loss = sum(fmap.square().sum() for fmap in backbone(images()))
    if frozen < 2:
        loss.backward()
    assert not without_gradient(backbone)
    for key, value in backbone.state_dict().items():
        kept = key.removeprefix("model.").startswith(parts) if parts else False
        if key in dict(backbone.named_parameters()):
            assert backbone.get_parameter(key).requires_grad != kept, key
        elif key.endswith("num_batches_tracked"):
            assert (value == before[key]) == kept, key
    for key, module in backbone.model.named_modules():
        assert module.training != f"{key}.".startswith(parts or ("nothing",)), key


def test_batch_norms_that_stay_as_they_are():
    backbone = build("test_efficient_vmamba", norm_eval=True).train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    assert before
    backbone(images())
    assert_close(dict(backbone.named_buffers()), before, rtol=0, atol=0)
    assert backbone.model.stages[0].blocks[0].conv.training
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    moving = build("test_efficient_vmamba").train()
    assert all(m.training for m in moving.modules() if isinstance(m, nn.BatchNorm2d))


@smallest
def test_norms_of_the_maps(name):
    """As upstream's detectors: a norm of its own for each map, over the channels."""
    normed, plain = (build(name, out_indices=(0, 2), out_norms=norms).eval() for norms in (True, False))
    normed.load_state_dict(plain.state_dict(), strict=False)
    nn.init.normal_(normed.norms[1].weight)
    for norm, found, fmap in zip(normed.norms, normed(images()), plain(images()), strict=True):
        wanted = nn.functional.layer_norm(fmap.permute(0, 2, 3, 1), fmap.shape[1:2], norm.weight, norm.bias, 1e-5)
        assert_close(found, wanted.permute(0, 3, 1, 2))


@smallest
@pytest.mark.parametrize("classes", [0, 7])
def test_checkpoints_of_our_own(name, classes, tmp_path):
    """A whole model's, with any classifier, and that of a backbone."""
    source = filled(name, num_classes=classes)
    save_file(source.state_dict(), tmp_path / "whole.safetensors")
    backbone = build(name, out_indices=(0, 1), pretrained=str(tmp_path / "whole.safetensors"))
    backbone.init_weights()
    torch.save({"state_dict": backbone.model.state_dict()}, tmp_path / "cut.pth")
    again = build(name, out_indices=(0, 1), init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "cut.pth")})
    again.init_weights()
    assert_close(again.state_dict(), backbone.state_dict(), rtol=0, atol=0)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in again.model.state_dict().items())


def test_official_checkpoints(parity, tmp_path):
    name = "efficient_vmamba_tiny"
    facts = json.loads((parity / f"{name}.json").read_text())
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    state = {m["key"]: (9 * torch.rand(m["shape"])).to(dtypes[m["dtype"]]) for m in facts["params"]}
    torch.save({"model": state}, tmp_path / "official.pth")
    backbone = build(name, pretrained=str(tmp_path / "official.pth"))
    backbone.init_weights()
    wanted = model_zoo.convert(state, name)
    assert all(torch.equal(value, wanted[key]) for key, value in backbone.model.state_dict().items())


@smallest
def test_what_does_not_fit_is_refused(name, tmp_path):
    """Of another model, a part missing, a part too much, cut short, none at all; the backbone stays as it was."""
    state = timm.create_model(name).state_dict()
    key = random.choice(sorted(state))
    wrong = {
        "missing": {k: value for k, value in state.items() if k != key},
        "unexpected": {**state, "extra.weight": torch.zeros(1)},
        "of another shape": {**state, key: torch.zeros(1, 2, 3, 4, 5)},
        "missing: ": timm.create_model("test_vmamba" if name != "test_vmamba" else "test_vim2").state_dict(),
    }
    backbone = build(name, pretrained=str(tmp_path / "model.pth"))
    before = {k: value.clone() for k, value in backbone.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        backbone.init_weights()
    for complaint, content in wrong.items():
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=f"does not fit(.|\n)*{complaint}"):
            backbone.init_weights()
        assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    (tmp_path / "model.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        backbone.init_weights()


class Detector(BaseModule):
    def __init__(self, backbone):
        super().__init__(init_cfg={"type": "Constant", "val": 3.0, "layer": "Linear"})
        self.backbone = LIBRARY.build(backbone)
        self.head = nn.Linear(48, 2)


def test_a_detector_fills_its_backbone_once(tmp_path):
    """Other initialisation comes before the checkpoint, whose values stand; a second call changes nothing."""
    source = filled("test_vmamba")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    settings = [
        {"type": "Pretrained", "checkpoint": str(tmp_path / "model.pth")},
        {"type": "Constant", "val": 5.0, "layer": ["Linear", "LayerNorm2d"]},
    ]
    config = {"type": "vision_ssm.VSSMBackbone", "model_name": "test_vmamba", "out_norms": True, "init_cfg": settings}
    detector = Detector(config)
    detector.init_weights()
    assert (detector.head.weight == 3).all() and all((norm.weight == 5).all() for norm in detector.backbone.norms)
    state = source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in detector.backbone.model.state_dict().items())
    with torch.no_grad():
        detector.backbone.model.stem[0].weight.zero_()
    detector.init_weights()
    assert not detector.backbone.model.stem[0].weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "resnet18"}, "unknown model 'resnet18'.*vmamba_tiny"),
        ({"out_indices": (2, 1)}, r"out_indices must ascend and lie between -4 and 3; got \(2, 1\)"),
        ({"out_indices": (1, 1)}, "out_indices must ascend"),
        ({"out_indices": ()}, "out_indices must ascend"),
        ({"out_indices": (0, 4)}, "out_indices must ascend"),
        ({"out_indices": (-5, 1)}, "out_indices must ascend"),
        ({"out_indices": (0, 1), "frozen_stages": 3}, "frozen_stages must lie between -1 and 2.* got 3"),
        ({"frozen_stages": -2}, "frozen_stages must lie between -1 and 4.* got -2"),
        ({"pretrained": True}, "file of a checkpoint; got True"),
        ({"pretrained": "a", "init_cfg": {"type": "Pretrained", "checkpoint": "b"}}, "one checkpoint.* got b, a"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "b", "prefix": "x."}}, "takes type and checkpoint alone"),
        ({"num_classes": 3}, "num_classes"),
        ({"depth": (1, 1)}, "depth"),
    ],
    ids=str,
)
def test_wrong_arguments_say_what_is_accepted(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**{"name": "test_vmamba", **options} if "model_name" not in options else {"name": options["model_name"]})
