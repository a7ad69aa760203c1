"""MzeroMiko/VMamba checkpoints (v0 and v2) to vision_ssm. One row per renamed part, applied in order."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import rename_keys, unwrapped

DIRECTIONS = 4

SS2D = (
    (r"\.op\.x_proj_weight$", ".mixer.scan.x_proj.weight"),
    (r"\.op\.dt_projs_(weight|bias)$", r".mixer.scan.dt_\1"),
    (r"\.op\.A_logs$", ".mixer.scan.A_log"),
    (r"\.op\.Ds$", ".mixer.scan.D"),
    (r"\.op\.out_norm\.", ".mixer.norm."),
    (r"\.op\.conv2d\.", ".mixer.conv."),
    (r"\.op\.", ".mixer."),
)

RENAMES = (
    # older spelling, still found in released files
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
    # stem: convolution, norm, activation, convolution, norm
    (r"^patch_embed\.0\.", "stem.0."),
    (r"^patch_embed\.2\.", "stem.1."),
    (r"^patch_embed\.5\.", "stem.3."),
    (r"^patch_embed\.7\.", "stem.4."),
    # stages; a stage of ours begins with the down-sampling that ends the one before it upstream
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^layers\.{stage}\.downsample\.", f"stages.{stage + 1}.downsample.") for stage in range(3)),
    (r"\.downsample\.1\.", ".downsample.0."),
    (r"\.downsample\.3\.", ".downsample.1."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    *SS2D,
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
)


def is_official(source: Mapping[str, Any]) -> bool:
    """Whether ``source`` is laid out as the official project does."""
    keys = unwrapped(source).keys()
    foreign = any(".conv_branch." in key for key in keys)  # EfficientVMamba
    return not foreign and any(re.search(r"\.(op|self_attention)\.", key) for key in keys)


def convert(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official state dict, or the dictionary around it, to ours. Pure: the result shares the tensors' memory."""
    renamed = rename_keys(unwrapped(source), RENAMES)
    return {name: reshaped(name, value) for name, value in renamed.items()}


def reshaped(name: str, value: Tensor) -> Tensor:
    """A tensor of the official project in the shape that ours has under ``name``."""
    if name.endswith("scan.x_proj.weight"):
        return value.flatten(0, 1) if value.dim() == 3 else value  # (k, r + 2n, e) -> (k*(r + 2n), e)
    if name.endswith(("scan.A_log", "scan.D")):
        if value.numel() and value.dim() and value.shape[0] % DIRECTIONS == 0:
            return value.unflatten(0, (DIRECTIONS, -1))  # (k*e, ...) -> (k, e, ...)
        return value  # of no use; strict loading lists it among those of another shape
    if re.search(r"(proj|fc\d)\.weight$", name) and value.dim() == 4:
        return value.flatten(1)  # 1 x 1 convolution to linear
    return value
