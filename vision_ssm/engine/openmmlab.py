"""The backbones as mmdet, mmseg and mmpretrain build them: ``dict(type="vision_ssm.VSSMBackbone", ...)``.

mmengine imports ``vision_ssm.registry`` for the prefix by itself; a config needs no ``custom_imports``.
"""

# Shapes: b batch, c channels, h w map.

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import timm
from mmengine.model import BaseModule, PretrainedInit, update_init_info
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_ssm.backbones.hierarchy import norm2d
from vision_ssm.model_zoo import checkpoints
from vision_ssm.model_zoo.converters import unwrapped

__all__ = ["MODELS", "VSSMBackbone"]

MODELS = Registry("model", parent=ROOT, scope="vision_ssm", locations=["vision_ssm.engine.openmmlab"])
"""What OpenMMLab's configs reach as ``vision_ssm.<name>``."""

Settings = Mapping[str, Any]


@MODELS.register_module()
class VSSMBackbone(BaseModule):
    """Feature maps of any model of this package, with what comes after the last wanted stage left out.

    Args:
        model_name: timm name, such as "vmamba_tiny".
        out_indices: stages whose maps are returned, ascending, or blocks of a plain model (Vim, Hydra-ViT); negative
            ones count from the end. By default every stage, or the last block.
        frozen_stages: how much is frozen, counted as mmdet's ResNet counts: -1 nothing, 0 the stem, n the stem and the
            first n stages (blocks). What is frozen stays in evaluation mode.
        norm_eval: batch norms stay in evaluation mode, so that their statistics do not change.
        out_norms: a new LayerNorm on each map, as VMamba's own detectors and segmentation networks have.
        with_cp: checkpoint the blocks: less memory, more time.
        pretrained: checkpoint file, short for ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: mmengine's initialisation, one or several. A checkpoint, official or our own, of the whole model or of
            this backbone, must fit key by key, the classifier included; as in mmengine, ``init_weights`` loads it.
        **model_args: other arguments of ``timm.create_model``: ``in_chans``, ``drop_path_rate``, ``mixer``.

    Shapes: (b, in_chans, H, W) -> tuple of (b, c_i, h_i, w_i), any H, W that the model takes.

    Raises:
        ValueError: a model of another package, indices or frozen stages that do not exist, two checkpoints or one with
            other settings; in ``init_weights``, keys missing, left over or of another shape.
        FileNotFoundError: in ``init_weights``, no such checkpoint.
    """

    def __init__(
        self,
        model_name: str,
        *,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        out_norms: bool = False,
        with_cp: bool = False,
        pretrained: str | PathLike[str] | None = None,
        init_cfg: Settings | Sequence[Settings] | None = None,
        **model_args: Any,
    ) -> None:
        checkpoints.require_own(model_name)
        super().__init__(_initialisation(pretrained, init_cfg))
        self.model_name, self.model_args, self.norm_eval = model_name, model_args, norm_eval
        self.model = cast(Any, timm.create_model(model_name, num_classes=0, **model_args))
        levels = [level["module"] for level in self.model.feature_info]
        self.out_indices = _ascending(out_indices, levels)
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=True)
        self.model.set_grad_checkpointing(with_cp)
        widths = [self.model.feature_info[level]["num_chs"] for level in self.out_indices]
        self.norms = nn.ModuleList(norm2d(width) if out_norms else nn.Identity() for width in widths)
        if not -1 <= frozen_stages <= self.out_indices[-1] + 1:
            raise ValueError(
                f"frozen_stages must lie between -1 and {self.out_indices[-1] + 1}, the stages that the maps need; "
                f"got {frozen_stages}"
            )
        stem = re.compile(self.model.group_matcher()["stem"])
        begin = [name for name, _ in self.model.named_children() if stem.match(name)]
        self.frozen = (begin + levels)[: len(begin) + frozen_stages] if frozen_stages >= 0 else []
        for name, parameter in self.model.named_parameters():
            if self.frozen and (stem.match(name) or name.startswith(tuple(f"{part}." for part in self.frozen))):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        return tuple(norm(fmap) for norm, fmap in zip(self.norms, maps, strict=True))

    def train(self, mode: bool = True) -> "VSSMBackbone":
        super().train(mode)
        for name in self.frozen:
            self.model.get_submodule(name).eval()
        for module in self.model.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self

    def load(self, checkpoint: str | PathLike[str]) -> None:
        """Loads a checkpoint as the class's docstring says; one that does not fit changes nothing."""
        state = checkpoints.to_ours(unwrapped(checkpoints.read(Path(checkpoint))))
        if checkpoints.misfits(state, self.model):  # that of a whole model, then
            classes = checkpoints.classes(state, self.model_name)
            whole = timm.create_model(self.model_name, num_classes=classes, **self.model_args)
            filled = checkpoints.load(whole, state).state_dict()
            state = {key: filled[key] for key in self.model.state_dict()}
        self.model.load_state_dict(state, strict=True)


class Filled:
    """What stands in ``init_cfg`` for mmengine's "Pretrained", which loads a file whether or not it fits."""

    def __init__(self, checkpoint: str | PathLike[str]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, module: VSSMBackbone) -> None:
        module.load(self.checkpoint)
        update_init_info(module, f"loaded from {self.checkpoint}")


def _initialisation(
    pretrained: Literal[True] | str | PathLike[str] | None, init_cfg: Settings | Sequence[Settings] | None
) -> list[Settings]:
    """Settings for mmengine, the checkpoint last."""
    if pretrained is True:
        raise ValueError("pretrained is the file of a checkpoint; got True. `vision-ssm zoo list` says where files are")
    settings = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or [])
    loaded = [entry for entry in settings if entry["type"] in ("Pretrained", PretrainedInit)]
    for entry in loaded:
        if entry.keys() != {"type", "checkpoint"}:
            raise ValueError(f"init_cfg of a checkpoint takes type and checkpoint alone; got {dict(entry)}")
    files = [entry["checkpoint"] for entry in loaded] + ([pretrained] if pretrained else [])
    if len(files) > 1:
        raise ValueError(f"one checkpoint is loaded, by init_cfg or by pretrained; got {', '.join(map(str, files))}")
    others = [entry for entry in settings if entry not in loaded]
    return others + [{"type": Filled, "checkpoint": file} for file in files]


def _ascending(indices: Sequence[int] | None, levels: Sequence[str]) -> list[int]:
    """The positions that ``indices`` mean; all stages, or the last block, by default."""
    count = len(levels)
    if indices is None:
        return list(range(count)) if levels[0].startswith("stages") else [count - 1]
    found = [index + count if index < 0 else index for index in indices]
    if not found or found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < count:
        raise ValueError(f"out_indices must ascend and lie between {-count} and {count - 1}; got {tuple(indices)}")
    return found
