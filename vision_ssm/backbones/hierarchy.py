"""The shell of hierarchical backbones: stem, stages that halve the map, norm, pooling, classifier.

Maps are channels-last inside a stage, and NCHW (as a view) between stages. A stage begins with its down-sampling, so
that it ends on the feature map that timm's feature API hands out.
"""

# Shapes: b batch, c channels, h w grid.

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_ssm.layers import RoutedScan, pad_grid
from vision_ssm.layers.channel_mixer import PerCell
from vision_ssm.model_zoo.checkpoints import to_ours

from .build import build
from .image import ImageConv2d

__all__ = [
    "ConvStage",
    "Hierarchy",
    "PatchMerging2d",
    "Stage",
    "build_hierarchy",
    "drop_path_rates",
    "norm2d",
    "patch_stem",
]

Backbone = TypeVar("Backbone", bound="Hierarchy")

norm2d = partial(LayerNorm2d, eps=1e-5)


def patch_stem(in_chans: int, dim: int) -> nn.Module:
    """Patches of 4 x 4; rows and columns that do not fill a patch are dropped."""
    return nn.Sequential(ImageConv2d(in_chans, dim, 4, stride=4), norm2d(dim))


class PatchMerging2d(nn.Module):
    """Swin's patch merging: (b, c, h, w) -> (b, out, ceil(h / 2), ceil(w / 2)), odd sizes are padded with zeros."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_grid(x.permute(0, 2, 3, 1), 2)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(x)).transpose(1, 2).unflatten(2, (h // 2, w // 2))


def drop_path_rates(depths: Sequence[int], rate: float) -> Iterator[float]:
    """Stochastic depth of every block in order: from 0 in the first linearly to ``rate`` in the last.

    Raises:
        ValueError: ``rate`` is no probability.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"drop_path_rate must lie between 0 and 1; got {rate}")
    return iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())


class Stage(nn.Module):
    """Down-sampling and blocks that map (b, h, w, c) to itself; (b, c, h, w) -> (b, c', h', w')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def mix(self, x: Tensor) -> Tensor:
        """The blocks, one after the other."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ConvStage(Stage):
    """Down-sampling and blocks that map (b, c, h, w) to itself; (b, c, h, w) -> (b, c', h', w')."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.downsample(x))


class Hierarchy(nn.Module):
    """Stem, stages, norm, pooling, classifier.

    Args:
        stem: (b, in_chans, h, w) -> (b, c, h / 4, w / 4).
        stages: one for each entry of ``dims``; all but the first halve the map.
        dims: channels of each stage.
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: pooling before the classifier.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans  # timm saves it with the weights
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"} for stage, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = norm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self._pooled_width()
        self.apply(_init_weights)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; the official layout is converted, so that timm's ``checkpoint_path`` accepts it."""
        return super().load_state_dict(to_ours(state_dict), strict=strict, assign=assign)

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
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier with ``num_classes`` outputs; 0 for none, ``global_pool=""`` for maps."""
        like = next(self.stem.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(like.device, like.dtype).train(self.training)
        self.head_hidden_size = self._pooled_width()

    def _pooled_width(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()  # pooling of two kinds doubles it

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
            raise ValueError(f"output_fmt must be 'NCHW'; got '{output_fmt}'. Permute the maps afterwards")
        wanted, last = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108, a script knows no conditional module
            stages = self.stages
        else:
            stages = self.stages[: last + 1]
        maps: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in wanted:
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages ``indices`` do not need; returns them. Norm and head go with the last stage."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shorter = last + 1 < len(self.stages)
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        self.num_features = self.head.in_features = self.feature_info[-1]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.head.global_pool.pool_type != "":
            return self.head(x, pre_logits=pre_logits)
        return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # not pooled: the logits of each cell

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    """As released: linear layers truncated normal; the projections inside a scan keep their own initialisation."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (RoutedScan, PerCell)):  # children come first: undo the above inside a scan
        module.reset_parameters()


def build_hierarchy(
    cls: type[Backbone], variant: str, pretrained: bool, *, output_stride: int = 32, **kwargs: Any
) -> Backbone:
    """timm's builder, for a backbone of four stages.

    Args:
        cls: the backbone.
        variant: its timm name.
        pretrained: load the weights of its configuration.
        output_stride: 32; other libraries ask for 8 or 16 where they want dilated convolutions.
        **kwargs: arguments of ``build`` and of the backbone.

    Raises:
        ValueError: another ``output_stride``.
    """
    if output_stride != 32:
        raise ValueError(
            f"{variant} has no dilated form: only output_stride=32 is accepted; got output_stride={output_stride}. "
            "Leave out the last stages with out_indices for finer maps"
        )
    features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build(cls, variant, pretrained, features=features, **kwargs)
