"""hustvl/Vim checkpoints to vision_ssm. One row per renamed part, applied in order."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Rename, rename_keys, unwrapped

RENAMES: tuple[Rename, ...] = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r".mixer.mixer.back.\1."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)\.", r".mixer.mixer.ahead.\1."),
    (r"\.mixer\.(A_b_log|D_b)$", lambda found: f".mixer.mixer.back.{found[1].replace('_b', '')}"),
    (r"\.mixer\.(A_log|D)$", r".mixer.mixer.ahead.\1"),
    (r"\.(ahead|back)\.conv1d\.", r".\1.conv."),
    (r"\.(ahead|back)\.x_proj\.", r".\1.scan.x_proj."),
    (r"\.(ahead|back)\.dt_proj\.", r".\1.scan.dt_"),
    (r"\.(ahead|back)\.(A_log|D)$", r".\1.scan.\2"),
)


def is_official(source: Mapping[str, Any]) -> bool:
    """Whether ``source`` is laid out as the official project does."""
    return any(re.match(r"layers\.\d+\.mixer\.in_proj\.", key) for key in unwrapped(source))


def convert(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official state dict, or the dictionary around it, to ours."""
    renamed = rename_keys(unwrapped(source), RENAMES)
    return {name: _reshaped(name, value) for name, value in renamed.items()}


def _reshaped(name: str, value: Tensor) -> Tensor:
    if name.endswith(("scan.dt_weight", "scan.dt_bias", "scan.A_log", "scan.D")):
        return value[None]  # one route
    if name.endswith("back.conv.weight"):
        return value.flip(-1)  # taps in the order of the tokens
    return value
