"""What the TIMMBackbone of mmpretrain and of mmseg do to a timm model, done to ours without installing either."""

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import vision_ssm

MODELS = vision_ssm.list_models("test_*")
PLAIN = ["test_hydra", "test_vim"]


class Wrapper(nn.Module):
    """The arguments that both share, and the answer as a tuple."""

    def __init__(self, model_name, features_only, pretrained=False, checkpoint_path="", in_channels=3, **kwargs):
        super().__init__()
        self.timm_model = timm.create_model(
            model_name,
            features_only=features_only,
            pretrained=pretrained,
            in_chans=in_channels,
            checkpoint_path=checkpoint_path,
            **kwargs,
        )

    def forward(self, x):
        features = self.timm_model(x)
        return tuple(features) if isinstance(features, (list, tuple)) else (features,)


class PretrainBackbone(Wrapper):
    """mmpretrain's way: no pyramid unless asked, classifier and pooling taken off, the feature table read."""

    def __init__(self, model_name, features_only=False, **kwargs):
        super().__init__(model_name, features_only, **kwargs)
        if hasattr(self.timm_model, "reset_classifier"):
            self.timm_model.reset_classifier(0, "")
        info = self.timm_model.feature_info
        table = info if isinstance(info, list) else info.get_dicts(keys=["num_chs", "reduction", "module"])
        self.table = [(row["num_chs"], row["reduction"], row["module"]) for row in table]


class SegmentationBackbone(Wrapper):
    """mmseg's way: a pyramid, and what a classifier would have used set to None, on the wrapper that timm gives."""

    def __init__(self, model_name, features_only=True, **kwargs):
        super().__init__(model_name, features_only, **kwargs)
        self.timm_model.global_pool = None
        self.timm_model.fc = None
        self.timm_model.classifier = None


def pyramid(backbone, x):
    info = backbone.timm_model.feature_info
    return [
        (len(x), channels, x.shape[2] // reduction, x.shape[3] // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_mmpretrain_gets_the_final_features(name):
    backbone = PretrainBackbone(name, in_channels=2).eval()
    x = torch.randn(2, 2, 32, 64)
    (features,) = backbone(x)
    assert features.shape == ((2, 2 * 4 + (name == "test_vim"), 32) if name in PLAIN else (2, 48, 1, 2))
    assert_close(features, backbone.timm_model.forward_features(x))
    assert len(backbone.table) == 4
    assert not [key for key in backbone.state_dict() if key.startswith("timm_model.head")]


@pytest.mark.parametrize("wrapper", [PretrainBackbone, SegmentationBackbone])
@pytest.mark.parametrize("name", MODELS)
def test_both_get_the_pyramid(name, wrapper):
    backbone = wrapper(name, features_only=True, in_channels=1).train()
    x = torch.randn(2, 1, 32, 64)
    maps = backbone(x)
    assert [tuple(fmap.shape) for fmap in maps] == pyramid(backbone, x)
    sum(fmap.square().mean() for fmap in maps).backward()
    unused = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert all(".norm." in key and ".blocks." not in key for key in unused)  # after the last block of plain backbones


@pytest.mark.parametrize("name", MODELS)
def test_mmseg_may_take_the_whole_model(name):
    """Pooling is None then, which the heads survive."""
    backbone = SegmentationBackbone(name, features_only=False, num_classes=5).eval()
    (logits,) = backbone(torch.randn(2, 3, 32, 64))
    assert logits.shape[0] == 2 and logits.shape[-1] == 5 and logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_out_indices_reach_timm(name):
    backbone = SegmentationBackbone(name, out_indices=(0, 2))
    x = torch.randn(1, 3, 32, 32)
    assert [tuple(fmap.shape) for fmap in backbone(x)] == pyramid(backbone, x)
    assert len(pyramid(backbone, x)) == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_the_whole_model_is_loaded(name, tmp_path):
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = PretrainBackbone(name, checkpoint_path=str(tmp_path / "model.pth")).timm_model.state_dict()
    wanted = model.state_dict()
    assert all(key.startswith("head") for key in wanted.keys() - found.keys())
    assert all(torch.equal(found[key], wanted[key]) for key in found)
