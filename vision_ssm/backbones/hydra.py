"""Hydra-ViT: a plain vision backbone of quasiseparable mixers, without attention, MLPs or position embedding.

Hwang et al., "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", NeurIPS 2024,
arXiv:2407.09941, section 4.3. No weights were released.

The paper gives ViT-Base's geometry with 24 Hydra layers in place of 12 pairs of attention and MLP, no position
embedding, and 91 M parameters. It leaves open, and is read here as: blocks x + Hydra(LayerNorm(x)) with a LayerNorm at
the end, the mean of the tokens for the classifier, and the layer's own defaults, among them 64 states and heads of 64
channels, which make 93 M parameters.
"""

# Shapes: b batch, c channels, l tokens.

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_ssm.layers import Hydra
from vision_ssm.layers.hydra import HydraTwin

from .build import build
from .hierarchy import drop_path_rates
from .plain import Plain

__all__ = ["HydraViT"]


class HydraBlock(nn.Module):
    """x + Hydra(norm(x)); (b, l, c) -> (b, l, c)."""

    def __init__(self, dim: int, mixer: nn.Module, *, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class HydraViT(Plain):
    """Patches, Hydra blocks, norm, mean, classifier.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg" for the mean of the tokens, "" for all tokens.
        patch_size: side of a patch.
        depth: blocks.
        dim: channels.
        state: size n of the state of each channel.
        head_dim: channels that decay alike.
        combine: how the two directions become one; a name in ``vision_ssm.layers.hydra.COMBINATIONS``.
        mixer: "hydra", or "identity" for the same projections, norm and gate without convolution and scans.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_chans, H, W) -> (b, num_classes), any H, W >= patch_size; what fills no patch is dropped.

    Raises:
        ValueError: the pooling, the combination or the mixer is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        patch_size: int = 16,
        depth: int = 24,
        dim: int = 768,
        state: int = 64,
        head_dim: int = 64,
        combine: str = "quasiseparable",
        mixer: str = "hydra",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if mixer not in ("hydra", "identity"):
            raise ValueError(f"mixer must be 'hydra' or 'identity'; got {mixer!r}")
        rates = drop_path_rates((depth,), drop_path_rate)
        make: Callable[[int], nn.Module] = HydraTwin
        if mixer == "hydra":
            make = partial(Hydra, state=state, head_dim=head_dim, combine=combine)
        blocks = [HydraBlock(dim, make(dim), drop_path=next(rates)) for _ in range(depth)]
        super().__init__(
            blocks,
            nn.LayerNorm(dim, eps=1e-5),
            dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_size=patch_size,
            stride=patch_size,
            drop_rate=drop_rate,
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):  # as in the paper's table of settings; heads of the SSM keep their own
                trunc_normal_(module.weight, std=0.02)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2407.09941",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "hydra_vit_small.untrained": _cfg(),
        "hydra_vit_base.untrained": _cfg(),
        "test_hydra.untrained": _cfg(input_size=(3, 160, 160), paper_ids=None),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **config: Any) -> HydraViT:
    return build(
        HydraViT,
        variant,
        pretrained,
        features={"out_indices": 3, "feature_cls": "getter"},
        **{**config, **kwargs},
    )


@register_model
def hydra_vit_small(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """Hydra-ViT with ViT-Small's width; not in the paper, no weights."""
    return _create("hydra_vit_small", pretrained, kwargs, dim=384)


@register_model
def hydra_vit_base(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """Hydra-ViT-B: 81.0 % top-1 as published, no weights released."""
    return _create("hydra_vit_base", pretrained, kwargs)


@register_model
def test_hydra(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """The smallest Hydra-ViT, for tests; unpublished, no weights."""
    return _create("test_hydra", pretrained, kwargs, depth=4, dim=32, state=4, head_dim=16)


register_model_deprecations(
    __name__,
    {f"hydra_vit_{size}_patch16_224": f"hydra_vit_{size}" for size in ("small", "base")},  # any size of image is taken
)
