"""EfficientVMamba: atrous selective scans beside convolutions, and inverted residuals where maps are small.

Pei et al., "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", AAAI 2025, arXiv:2403.09977.
Widths are those of the released weights, 48, 64 and 96, not those of the paper's table; model_zoo/converters/
efficient_vmamba.py converts a release.

Difference from the release, which changes no output: the shell is that of ``hierarchy.py``.
"""

# Shapes: b batch, c channels, h w grid.

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from vision_ssm.kernels import atrous
from vision_ssm.layers import SS2D, RoutedScan
from vision_ssm.layers.convolution import Conv2d
from vision_ssm.layers.mixers import Mixer
from vision_ssm.model_zoo.converters import efficient_vmamba as upstream

from .hierarchy import ConvStage, Hierarchy, PatchMerging2d, Stage, build_hierarchy, drop_path_rates, patch_stem

__all__ = ["EfficientVMamba"]


class ChannelAttention(nn.Module):
    """x times a weight for each channel, found from the mean of norm(x) over the cells; (b, l, c) -> (b, l, c)."""

    def __init__(self, dim: int, reduction: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.reduce = nn.Linear(dim, dim // reduction)
        self.act = nn.GELU()
        self.expand = nn.Linear(dim // reduction, dim)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.expand(self.act(self.reduce(self.norm(x).mean(1, keepdim=True))))
        return x * weight.sigmoid()


class EfficientBlock(nn.Module):
    """x + attention(SS2D(norm(x))) + attention(convolutions(norm(x))), one attention for both (section 3.3).

    Shapes: (b, h, w, c) -> (b, h, w, c).
    """

    def __init__(self, dim: int, *, make_mixer: Callable[[int], nn.Module], drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = make_mixer(dim)
        self.conv = nn.Sequential(
            Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU(), Conv2d(dim, dim, 1)
        )
        self.attention = ChannelAttention(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        x = x.flatten(1, -2)  # as in the mixer, and for its reason
        normed = self.norm(x)
        mixed = self.mixer(normed.unflatten(1, grid)).flatten(1, -2)
        local = self.conv(normed.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return (x + self.drop_path(self.attention(mixed) + self.attention(local))).unflatten(1, grid)


def conv_block(dim: int, *, drop_path: float) -> nn.Module:
    """timm's inverted residual with squeeze and excitation; (b, c, h, w) -> (b, c, h, w)."""
    excite: Any = partial(SqueezeExcite, rd_ratio=1 / 8)
    block = InvertedResidual(dim, dim, exp_ratio=4.0, se_layer=excite, drop_path_rate=drop_path)
    for module in block.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d  # timm makes them, and takes no class of ours
    return block


class EfficientVMamba(Hierarchy):
    """Stem, two stages of efficient blocks, two of convolutions, norm, pooling, classifier.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: pooling before the classifier.
        depths: blocks of each stage.
        dims: channels of each stage.
        scanned: stages that scan, from the first on; the others are convolutional.
        stride: stride p of the mixer "atrous": p x p sub-maps, each with its own projections. Maps are padded to it.
        state: size n of the state.
        expand: inner width of SS2D as a multiple of the stage's.
        mixer: what mixes the cells inside SS2D; a name in ``vision_ssm.layers.MIXERS`` such as "cross", or "identity"
            for the same network without the SSM.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_chans, h, w) -> (b, num_classes), any h, w >= 4.

    Raises:
        ValueError: ``depths`` and ``dims`` differ in length, or the mixer is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: tuple[int, ...] = (2, 2, 4, 2),
        dims: tuple[int, ...] = (48, 96, 192, 384),
        scanned: int = 2,
        stride: int = 2,
        state: int = 16,
        expand: float = 2.0,
        mixer: str | Mixer = "atrous",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must have one entry a stage; got {depths} and {dims}")
        scan = partial(RoutedScan, routes=atrous(stride)) if mixer == "atrous" else mixer
        make_mixer = partial(SS2D, state=state, expand=expand, mixer=scan, gate=True, conv_bias=True)
        make_block: Callable[..., nn.Module] = partial(EfficientBlock, make_mixer=make_mixer)
        rates = drop_path_rates(depths, drop_path_rate)
        stem = patch_stem(in_chans, dims[0])
        stages = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            step = PatchMerging2d(dims[stage - 1], dim) if stage else nn.Identity()
            kind, make = (Stage, make_block) if stage < scanned else (ConvStage, conv_block)
            stages.append(kind(step, [make(dim, drop_path=next(rates)) for _ in range(depth)]))
        super().__init__(
            stem, stages, dims, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook: accepts checkpoints in the official layout and in ours."""
    return upstream.convert(state_dict) if upstream.is_official(state_dict) else dict(state_dict)


def _cfg(repository: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": repository and f"https://huggingface.co/TerryPei/{repository}",
        "paper_ids": "arXiv:2403.09977",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "efficient_vmamba_tiny.in1k": _cfg("EfficientVMamba-Tiny"),
        "efficient_vmamba_small.in1k": _cfg("EfficientVMamba-Small"),
        "efficient_vmamba_base.in1k": _cfg("EfficientVMamba-Base"),
        "test_efficient_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), paper_ids=None),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **config: Any) -> EfficientVMamba:
    return build_hierarchy(
        EfficientVMamba, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**config, **kwargs}
    )


@register_model
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6.5 M parameters, 76.5 % top-1 as published."""
    return _create("efficient_vmamba_tiny", pretrained, kwargs)


@register_model
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11.3 M parameters, 78.7 % top-1 as published."""
    return _create("efficient_vmamba_small", pretrained, kwargs, dims=(64, 128, 256, 512))


@register_model
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 33.7 M parameters, 81.8 % top-1 as published."""
    return _create("efficient_vmamba_base", pretrained, kwargs, depths=(2, 2, 9, 2), dims=(96, 192, 384, 768))


@register_model
def test_efficient_vmamba(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """The smallest EfficientVMamba, for tests; unpublished, no weights."""
    return _create("test_efficient_vmamba", pretrained, kwargs, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), state=2)
