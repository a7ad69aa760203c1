"""VMamba: hierarchical vision backbone with cross-scan selective state spaces.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
Weights: https://github.com/MzeroMiko/VMamba (MIT), converted by model_zoo/converters/vmamba.py.

Differences from the release, none of which changes an output:

- the shell is that of ``hierarchy.py``: maps are channels-last inside a stage, which begins with its down-sampling;
- only the two published block designs are kept: v2 (convolution stem, MLP, no gate) and v0 (patch stem, gate, no MLP).
"""

# Shapes: b batch, c channels, h w grid.

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_ssm.layers import SS2D
from vision_ssm.layers.convolution import Conv2d
from vision_ssm.layers.mixers import Mixer
from vision_ssm.layers.mlp import LeanMlp
from vision_ssm.model_zoo.converters import vmamba as upstream

from .hierarchy import Hierarchy, PatchMerging2d, Stage, build_hierarchy, drop_path_rates, norm2d, patch_stem
from .image import ImageConv2d

__all__ = ["VMamba"]


def conv_stem(in_chans: int, dim: int) -> nn.Module:
    """v2: two convolutions of stride 2; (b, 3, h, w) -> (b, c, ceil(h / 4), ceil(w / 4))."""
    return nn.Sequential(
        ImageConv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        norm2d(dim // 2),
        nn.GELU(),
        Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        norm2d(dim),
    )


def conv_downsample(dim: int, out: int) -> nn.Module:
    """v2: a convolution of stride 2, odd sizes round up."""
    return nn.Sequential(Conv2d(dim, out, 3, stride=2, padding=1), norm2d(out))


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)) where the variant has one; (b, h, w, c) -> (b, h, w, c)."""

    def __init__(self, dim: int, *, make_mixer: Callable[[int], nn.Module], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = make_mixer(dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5) if mlp_ratio else None
        self.mlp = LeanMlp(dim, int(mlp_ratio * dim)) if mlp_ratio else None

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        x = x.flatten(1, -2)  # as in the mixer, and for its reason
        x = x + self.drop_path(self.mixer(self.norm1(x).unflatten(1, grid)).flatten(1, -2))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.unflatten(1, grid)


class VMamba(Hierarchy):
    """Stem, four stages of VSS blocks, norm, pooling, classifier.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: pooling before the classifier.
        depths: blocks of each stage.
        dims: channels of each stage.
        state: size n of the state.
        expand: inner width of SS2D as a multiple of the stage's.
        mlp_ratio: hidden width of the MLP as a multiple of the stage's; 0 for none.
        gate: SS2D with gate and convolution bias (v0).
        stem: stem(in_chans, dim) -> module of stride 4.
        downsample: downsample(dim, out) -> module of stride 2.
        mixer: what mixes the cells inside SS2D; a name in ``vision_ssm.layers.MIXERS`` such as "cross", or "identity"
            for the same network without the SSM.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_chans, h, w) -> (b, num_classes), any h, w >= 1 (>= 4 with the patch stem).

    Raises:
        ValueError: ``depths`` and ``dims`` differ in length, or the mixer is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        state: int = 1,
        expand: float = 1.0,
        mlp_ratio: float = 4.0,
        gate: bool = False,
        stem: Callable[[int, int], nn.Module] = conv_stem,
        downsample: Callable[[int, int], nn.Module] = conv_downsample,
        mixer: str | Mixer = "cross",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must have one entry a stage; got {depths} and {dims}")
        make_mixer = partial(SS2D, state=state, expand=expand, mixer=mixer, gate=gate, conv_bias=gate)
        rates = drop_path_rates(depths, drop_path_rate)
        first = stem(in_chans, dims[0])
        stages = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            step = downsample(dims[stage - 1], dim) if stage else nn.Identity()
            blocks = [
                VSSBlock(dim, make_mixer=make_mixer, mlp_ratio=mlp_ratio, drop_path=next(rates)) for _ in range(depth)
            ]
            stages.append(Stage(step, blocks))
        super().__init__(
            first,
            stages,
            dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook: accepts checkpoints in the official layout and in ours."""
    return upstream.convert(state_dict) if upstream.is_official(state_dict) else dict(state_dict)


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": file and f"https://github.com/MzeroMiko/VMamba/releases/download/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "paper_ids": "arXiv:2401.10166",
        **kwargs,
    }


_OWN: dict[str, Any] = {"license": "apache-2.0", "origin_url": "", "paper_ids": None}

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.s1l8_in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small.s2l15_in1k": _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_small_s1l20.in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base.s2l15_in1k": _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_base_s1l20.in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_v0.in1k": _cfg("%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vmamba_small_v0.in1k": _cfg("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vmamba_base_v0.in1k": _cfg("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"),
        "vmamba_nano.untrained": _cfg(**_OWN),
        "test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), **_OWN),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **config: Any) -> VMamba:
    return build_hierarchy(
        VMamba, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**config, **kwargs}
    )


_TINY = (96, 192, 384, 768)
_BASE = (128, 256, 512, 1024)
_V0: dict[str, Any] = {
    "state": 16,
    "expand": 2.0,
    "mlp_ratio": 0.0,
    "gate": True,
    "stem": patch_stem,
    "downsample": PatchMerging2d,
}


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, s1l8: 30 M parameters, 82.6 % top-1 as published."""
    return _create("vmamba_tiny", pretrained, kwargs, depths=(2, 2, 8, 2), dims=_TINY)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, s2l5: inner width doubled, 82.5 % top-1 as published."""
    return _create("vmamba_tiny_s2l5", pretrained, kwargs, depths=(2, 2, 5, 2), dims=_TINY, expand=2.0)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, s2l15: 50 M parameters, 83.6 % top-1 as published."""
    return _create("vmamba_small", pretrained, kwargs, depths=(2, 2, 15, 2), dims=_TINY, expand=2.0)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, s1l20: 83.3 % top-1 as published."""
    return _create("vmamba_small_s1l20", pretrained, kwargs, depths=(2, 2, 20, 2), dims=_TINY)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, s2l15: 89 M parameters, 83.9 % top-1 as published."""
    return _create("vmamba_base", pretrained, kwargs, depths=(2, 2, 15, 2), dims=_BASE, expand=2.0)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, s1l20: 83.8 % top-1 as published."""
    return _create("vmamba_base_s1l20", pretrained, kwargs, depths=(2, 2, 20, 2), dims=_BASE)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-T: 23 M parameters, 82.2 % top-1 as published."""
    return _create("vmamba_tiny_v0", pretrained, kwargs, depths=(2, 2, 9, 2), dims=_TINY, **_V0)


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-S: 83.5 % top-1 as published."""
    return _create("vmamba_small_v0", pretrained, kwargs, depths=(2, 2, 27, 2), dims=_TINY, **_V0)


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-B: 83.7 % top-1 as published."""
    return _create("vmamba_base_v0", pretrained, kwargs, depths=(2, 2, 27, 2), dims=_BASE, **_V0)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A small VMamba of our own for demonstrations and small data; unpublished, no weights."""
    return _create("vmamba_nano", pretrained, kwargs, depths=(2, 2, 2, 1), dims=(32, 64, 128, 192), mlp_ratio=2.0)


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The smallest VMamba, for tests; unpublished, no weights."""
    return _create("test_vmamba", pretrained, kwargs, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), mlp_ratio=2.0)
