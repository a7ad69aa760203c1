"""VMamba: hierarchical vision backbone with cross-scan selective state spaces.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166.
Weights: https://github.com/MzeroMiko/VMamba (MIT), converted by model_zoo/converters/vmamba.py.

Differences from the release, none of which changes an output:

- a stage begins with its down-sampling, so that it ends on the feature map that timm's feature API hands out;
- maps are channels-last inside a stage, and NCHW (as a view) between stages;
- only the two published block designs are kept: v2 (convolution stem, MLP, no gate) and v0 (patch stem, gate, no MLP).
"""

# Shapes: b batch, c channels, h w grid.

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vision_ssm.layers import SS2D, RoutedScan
from vision_ssm.layers.ss import Mixer
from vision_ssm.model_zoo.converters import vmamba as upstream

__all__ = ["VMamba"]

_norm = partial(LayerNorm2d, eps=1e-5)


def conv_stem(in_chans: int, dim: int) -> nn.Module:
    """v2: two convolutions of stride 2; (b, 3, h, w) -> (b, c, ceil(h / 4), ceil(w / 4))."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        _norm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        _norm(dim),
    )


def patch_stem(in_chans: int, dim: int) -> nn.Module:
    """v0: patches of 4 x 4; rows and columns that do not fill a patch are dropped."""
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), _norm(dim))


def conv_downsample(dim: int, out: int) -> nn.Module:
    """v2: a convolution of stride 2, odd sizes round up."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, stride=2, padding=1), _norm(out))


class PatchMerging2d(PatchMerging):
    """v0: Swin's patch merging on NCHW maps, odd sizes are padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)) where the variant has one; (b, h, w, c) -> (b, h, w, c)."""

    def __init__(self, dim: int, *, make_mixer: Callable[[int], nn.Module], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = make_mixer(dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5) if mlp_ratio else None
        self.mlp = Mlp(dim, int(mlp_ratio * dim)) if mlp_ratio else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VSSStage(nn.Module):
    """Down-sampling and blocks; (b, c, h, w) -> (b, c', h', w')."""

    def __init__(self, downsample: nn.Module, blocks: list[VSSBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
        return x.permute(0, 3, 1, 2)


class VMamba(nn.Module):
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
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must have one entry a stage; got {depths} and {dims}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"} for stage, dim in enumerate(dims)
        ]
        make_mixer = partial(SS2D, state=state, expand=expand, mixer=mixer, gate=gate, conv_bias=gate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        self.stem = stem(in_chans, dims[0])
        stages = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            step = downsample(dims[stage - 1], dim) if stage else nn.Identity()
            blocks = [
                VSSBlock(dim, make_mixer=make_mixer, mlp_ratio=mlp_ratio, drop_path=next(rates)) for _ in range(depth)
            ]
            stages.append(VSSStage(step, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = _norm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D", ".dt_bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, VSSStage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier with ``num_classes`` outputs; 0 for none, ``global_pool=""`` for maps."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after the stages ``indices`` (all by default; the last n for an int), and the final features.

        Args:
            x: image, (b, in_chans, h, w).
            indices: stages to return.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out what comes after the last stage wanted.
            output_fmt: "NCHW".
            intermediates_only: return the list of maps alone.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}. Permute the maps afterwards")
        wanted, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        maps = []
        x = self.stem(x)
        for stage, module in enumerate(stages):
            x = module(x)
            if stage in wanted:
                maps.append(self.norm(x) if norm and stage == len(self.stages) - 1 else x)
        return maps if intermediates_only else (self.norm(x) if len(stages) == len(self.stages) else x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages ``indices`` do not need; returns them."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    """As released: linear layers truncated normal; the projections inside a scan keep their own initialisation."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RoutedScan):  # children come first: undo the above inside a scan
        module.reset_parameters()


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
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**config, **kwargs},
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
