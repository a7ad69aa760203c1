"""Vim: a plain vision backbone of bidirectional selective scans, its class token in the middle of the patches.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML 2024,
arXiv:2401.09417. Weights: https://github.com/hustvl/Vim (Apache-2.0), converted by model_zoo/converters/vim.py.

Differences from the release, none of which changes an output: the way back has its convolution's taps in the order of
the tokens, and any image of at least one patch is accepted, the position embedding being resampled around the class
token.
"""

# Shapes: b batch, c channels, e inner channels, h w grid of patches, l = h w + 1 tokens.

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_ssm.layers import find_mixer
from vision_ssm.layers.bidirectional import BothDirections
from vision_ssm.layers.convolution import trains_compiled
from vision_ssm.layers.mamba import Mamba
from vision_ssm.layers.mixers import Mixer
from vision_ssm.model_zoo.converters import vim as upstream

from .build import build
from .hierarchy import drop_path_rates
from .plain import Plain

__all__ = ["Vim"]


class VimBlock(nn.Module):
    """x + scan(norm(x)); (b, l, c) -> (b, l, c). Under autocast the stream stays in float32."""

    def __init__(self, dim: int, *, state: int, mixer: str | Mixer, drop_path: float) -> None:
        super().__init__()
        make_mixer = BothDirections if mixer == "bidirectional" else find_mixer(mixer, spatial_dims=1)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Mamba(dim, mixer=make_mixer, state=state)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


@register_notrace_module
class Positions(nn.Module):
    """A position embedding, (1, l, c), made for one grid, resampled around the class token to that of (b, c, h, w)."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = list(grid)

    def forward(self, embedding: Tensor, patches: Tensor) -> Tensor:
        grid = list(patches.shape[-2:])
        if (torch.jit.is_scripting() or not torch.compiler.is_compiling()) and grid == self.grid:
            return embedding  # a compiled program does not ask: it serves every size
        cls, cells = _take(embedding)
        wide = cells.to(torch.promote_types(cells.dtype, torch.float32)).unflatten(1, self.grid).permute(0, 3, 1, 2)
        if not torch.jit.is_scripting() and trains_compiled():
            resampled = _interpolate_by_matrices(wide, grid)
        else:
            resampled = F.interpolate(wide, size=grid, mode="bicubic", antialias=True)
        return _insert(cls, resampled.flatten(2).transpose(1, 2).to(cells.dtype))


def _interpolate_by_matrices(x: Tensor, grid: Sequence[int]) -> Tensor:
    """``F.interpolate``, axis by axis: PyTorch cannot compile the gradient of its own for sizes that change."""
    for axis, size in ((-1, grid[1]), (-2, grid[0])):
        eye = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)[None, None]
        matrix = F.interpolate(eye, size=[size, x.shape[axis]], mode="bicubic", antialias=True)[0, 0]
        x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x


class Vim(Plain):
    """Patches, a class token in their middle, position embedding, blocks, norm, classifier.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "token" for the class token, "avg" for the mean of the patches, "" for all tokens.
        img_size: side of the image (or its height and width) for which the position embedding is made.
        patch_size: side of a patch.
        stride: step between patches; less than ``patch_size`` where they overlap, ``patch_size`` by default.
        depth: blocks.
        dim: channels.
        state: size n of the state.
        mixer: what mixes the tokens: "bidirectional" with a convolution for each direction, as released; another name
            in ``vision_ssm.layers.MIXERS``, on a sequence; or "identity" for the same network without the SSM.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 in the first block linearly to this in the last.

    Shapes: (b, in_chans, H, W) -> (b, num_classes), any H, W >= patch_size; what fills no patch is dropped.

    Raises:
        ValueError: the pooling or the mixer is unknown, the stride below 1, or ``img_size`` smaller than a patch.
    """

    pools = ("token", "avg", "")
    skipped_by_weight_decay = (*Plain.skipped_by_weight_decay, "cls_token", "pos_embed")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        dim: int = 192,
        state: int = 16,
        mixer: str | Mixer = "bidirectional",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        step = patch_size if stride is None else stride
        if step < 1:
            raise ValueError(f"stride must be at least 1; got {step}")
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2 or min(sides) < patch_size:
            raise ValueError(
                "img_size must be a side, or a height and a width, that hold a patch of "
                f"{patch_size} x {patch_size} pixels; got {img_size}"
            )
        rates = drop_path_rates((depth,), drop_path_rate)
        blocks = [VimBlock(dim, state=state, mixer=mixer, drop_path=next(rates)) for _ in range(depth)]
        super().__init__(
            blocks,
            nn.RMSNorm(dim, eps=1e-5),
            dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_size=patch_size,
            stride=step,
            drop_rate=drop_rate,
        )
        grid = (sides[0] - patch_size) // step + 1, (sides[1] - patch_size) // step + 1
        self.positions = Positions(grid)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid) + 1, dim))
        for embedding in (self.cls_token, self.pos_embed):
            trunc_normal_(embedding, std=0.02)
        # As released: what adds to the stream is scaled by the depth, and Δ on the way back is not small.
        for block in blocks:
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(math.sqrt(depth))
            if isinstance(block.mixer.mixer, BothDirections):
                nn.init.zeros_(block.mixer.mixer.back.scan.dt_bias)

    def tokens(self, patches: Tensor) -> Tensor:
        """Tokens of a map of patches: row by row, the class token in the middle, the position embedding added."""
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return _insert(cls, patches.flatten(2).transpose(1, 2)) + self.positions(self.pos_embed, patches)

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return _take(tokens)


def _insert(cls: Tensor, patches: Tensor) -> Tensor:
    """The class token after the first half of the patches."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], cls, patches[:, middle:]], dim=1)


def _take(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The class token and the patches: undo ``_insert``."""
    middle = (tokens.shape[1] - 1) // 2
    return tokens[:, middle : middle + 1], torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook: accepts checkpoints in the official layout and in ours."""
    return upstream.convert(state_dict) if upstream.is_official(state_dict) else dict(state_dict)


def _cfg(repository: str = "", **kwargs: Any) -> dict[str, Any]:
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
        "origin_url": repository and f"https://huggingface.co/hustvl/{repository}",
        "paper_ids": "arXiv:2401.09417",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny.in1k": _cfg("Vim-tiny-midclstok"),
        "vim_tiny_stride8.in1k": _cfg("Vim-tiny-midclstok"),
        "vim_small.in1k": _cfg("Vim-small-midclstok"),
        "vim_small_stride8.in1k": _cfg("Vim-small-midclstok"),
        "vim_base.in1k": _cfg("Vim-base-midclstok"),
        "test_vim.untrained": _cfg(input_size=(3, 160, 160), paper_ids=None),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **config: Any) -> Vim:
    return build(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        features={"out_indices": 3, "feature_cls": "getter"},
        **{**config, **kwargs},
    )


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-T: 7 M parameters, 76.1 % top-1 as published."""
    return _create("vim_tiny", pretrained, kwargs)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-T, fine-tuned with overlapping patches: 78.3 % top-1 as published."""
    return _create("vim_tiny_stride8", pretrained, kwargs, stride=8)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 26 M parameters, 80.5 % top-1 as published."""
    return _create("vim_small", pretrained, kwargs, dim=384)


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, fine-tuned with overlapping patches: 81.6 % top-1 as published."""
    return _create("vim_small_stride8", pretrained, kwargs, dim=384, stride=8)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 81.9 % top-1 as published."""
    return _create("vim_base", pretrained, kwargs, dim=768)


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """The smallest Vim, for tests; unpublished, no weights."""
    return _create("test_vim", pretrained, kwargs, img_size=160, depth=4, dim=32, state=2)
