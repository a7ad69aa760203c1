"""TerryPei/EfficientVMamba checkpoints to vision_ssm. One row per renamed part, applied in order."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Rename, rename_keys, unwrapped
from .vmamba import SS2D, reshaped

_SCANNED = 2

RENAMES: tuple[Rename, ...] = (
    (r"^patch_embed\.0\.", "stem.0."),
    (r"^patch_embed\.2\.", "stem.1."),
    # stages that scan: as VMamba's
    *((rf"^layers\.{stage}\.downsample\.", f"stages.{stage + 1}.downsample.") for stage in range(_SCANNED)),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.conv_branch\.", ".conv."),
    (r"(stages\.[01]\.blocks\.\d+)\.se\.", r"\1.attention."),
    (r"\.global_reduce\.", ".reduce."),
    (r"\.channel_select\.", ".expand."),
    *SS2D,
    # convolutional stages are sequences: a change of layout, the blocks, a change of layout, the down-sampling
    (r"^layers\.2\.\d+\.(norm|reduction)\.", r"stages.3.downsample.\1."),
    (r"^layers\.([23])\.(\d+)\.", lambda found: f"stages.{found[1]}.blocks.{int(found[2]) - 1}."),
    (r"\.conv_(pw|dw)\.0\.", r".conv_\1."),
    (r"\.conv_pw2\.0\.", ".conv_pwl."),
    (r"\.conv_pw\.1\.", ".bn1."),
    (r"\.conv_dw\.1\.", ".bn2."),
    (r"\.conv_pw2\.1\.", ".bn3."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
)


def is_official(source: Mapping[str, Any]) -> bool:
    """Whether ``source`` is laid out as the official project does."""
    return any(re.match(r"layers\.\d+\.blocks\.\d+\.conv_branch\.", key) for key in unwrapped(source))


def convert(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official state dict, or the dictionary around it, to ours. Pure: the result shares the tensors' memory."""
    renamed = rename_keys(unwrapped(source), RENAMES)
    return {name: reshaped(name, value) for name, value in renamed.items()}
