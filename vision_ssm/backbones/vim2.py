"""ViM2: a hierarchical backbone that selects tokens and channels, with learned averages of earlier features.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888. No code and no weights were released; parameter counts are this package's own.

What the paper leaves open is read here as follows. A block is two token mixers and one channel mixer, as its table
counts them. The token mixer is VMamba's first form: four routes, B, C and Δ from the convolved map, a SiLU gate. The
channel mixer scans the channels of each cell in both directions, ``channel_scan`` offers a cheaper form. Averages begin
with weight 1 on the newest outputs. A LayerNorm stands before every mixer, and a stage hands on the output of its last
channel mixer.
"""

# Shapes: b batch, c channels, h w grid.

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_ssm.layers import MambaMixerBlock
from vision_ssm.layers.mixers import Mixer

from .hierarchy import Hierarchy, PatchMerging2d, Stage, build_hierarchy, drop_path_rates, patch_stem

__all__ = ["ViM2"]


class MixerStage(Stage):
    """Down-sampling and mixer blocks; (b, c, h, w) -> (b, c', h', w')."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[MambaMixerBlock]) -> None:
        super().__init__(downsample, ())
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]  # each takes the size too

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[2], x.shape[3]
        outputs = [x.flatten(2).transpose(1, 2)]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                outputs = checkpoint(block, outputs, height, width)
            else:
                outputs = block(outputs, height, width)
        return outputs[-1].transpose(1, 2).unflatten(2, [height, width])


class ViM2(Hierarchy):
    """Stem, four stages of token and channel mixers, norm, pooling, classifier.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: pooling before the classifier.
        depths: blocks of each stage, each of two token mixers and a channel mixer.
        dims: channels of each stage.
        channel_expand: inner channels of each stage's channel mixers as a multiple of the stage's.
        state: size n of the states.
        mixer: what mixes the cells; a name in ``vision_ssm.layers.MIXERS``, or "identity" for the same network without
            scans of cells and of channels.
        channel_scan: what a channel is to the scan along channels; a name in
            ``vision_ssm.layers.channel_mixer.CHANNEL_SCANS``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the mixers, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_chans, h, w) -> (b, num_classes), any h, w >= 4.

    Raises:
        ValueError: entries of stages differ in number, or a mixer or channel scan is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: tuple[int, ...] = (1, 1, 3, 1),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        channel_expand: tuple[float, ...] = (2.0, 2.0, 2.0, 1.0),
        state: int = 16,
        mixer: str | Mixer = "cross",
        channel_scan: str = "cell",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if not len(depths) == len(dims) == len(channel_expand):
            raise ValueError(
                "depths, dims and channel_expand must have one entry a stage; "
                f"got {depths}, {dims} and {channel_expand}"
            )
        scan = "identity" if mixer == "identity" else channel_scan
        rates = drop_path_rates(depths, drop_path_rate)
        stem = patch_stem(in_chans, dims[0])
        stages = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            make = partial(MambaMixerBlock, dim, channel_expand=channel_expand[stage], state=state, mixer=mixer)
            blocks = [make(index=i, channel_scan=scan, drop_path=rate) for i, rate in enumerate(islice(rates, depth))]
            step = PatchMerging2d(dims[stage - 1], dim) if stage else nn.Identity()
            stages.append(MixerStage(step, blocks))
        super().__init__(
            stem, stages, dims, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )


def _cfg(**kwargs: Any) -> dict[str, Any]:
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
        "paper_ids": "arXiv:2403.19888",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny.untrained": _cfg(),
        "vim2_small.untrained": _cfg(),
        "vim2_base.untrained": _cfg(),
        "test_vim2.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), paper_ids=None),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **config: Any) -> ViM2:
    return build_hierarchy(ViM2, variant, pretrained, **{**config, **kwargs})


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-T: 82.7 % top-1 as published, no weights released."""
    return _create("vim2_tiny", pretrained, kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S: 83.7 % top-1 as published, no weights released."""
    return _create("vim2_small", pretrained, kwargs, depths=(1, 1, 9, 1))


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B: 83.9 % top-1 as published, no weights released."""
    return _create("vim2_base", pretrained, kwargs, depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024))


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """The smallest ViM2, for tests; unpublished, no weights."""
    return _create("test_vim2", pretrained, kwargs, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), state=2)
