"""Checkpoints in the layouts of their authors' releases, with random values."""

import re
from collections.abc import Callable
from typing import Any

import timm
import torch

import vision_ssm  # noqa: F401  registers the models

Renames = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def moved_down(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) - 1}.downsample."


# Our names to the official ones, written from the fact sheets and not from the converters' tables.
SCAN: Renames = [
    (r"\.mixer\.scan\.x_proj\.weight$", ".op.x_proj_weight"),
    (r"\.mixer\.scan\.dt_(weight|bias)$", r".op.dt_projs_\1"),
    (r"\.mixer\.scan\.A_log$", ".op.A_logs"),
    (r"\.mixer\.scan\.D$", ".op.Ds"),
    (r"\.mixer\.norm\.", ".op.out_norm."),
    (r"\.mixer\.conv\.", ".op.conv2d."),
    (r"\.mixer\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.fc\.", "classifier.head."),
    (r"^stem\.0\.", "patch_embed.0."),
    (r"^stem\.1\.", "patch_embed.2."),
]
TO_OFFICIAL: dict[str, Renames] = {
    "vmamba": [
        *SCAN,
        (r"^stem\.3\.", "patch_embed.5."),
        (r"^stem\.4\.", "patch_embed.7."),
        (r"^stages\.(\d)\.downsample\.0\.", lambda found: f"{moved_down(found)}1."),
        (r"^stages\.(\d)\.downsample\.1\.", lambda found: f"{moved_down(found)}3."),
        (r"\.norm1\.", ".norm."),
        (r"^stages\.", "layers."),
    ],
    "efficient_vmamba": [
        *SCAN,
        (r"^stages\.([12])\.downsample\.", moved_down),
        (r"^stages\.3\.downsample\.", "layers.2.4."),  # after two changes of layout and two blocks
        (r"^stages\.([01])\.(.*)\.conv\.", r"layers.\1.\2.conv_branch."),
        (r"\.attention\.", ".se."),
        (r"\.se\.reduce\.", ".se.global_reduce."),
        (r"\.se\.expand\.", ".se.channel_select."),
        (r"^stages\.([23])\.blocks\.(\d+)\.", lambda found: f"layers.{found[1]}.{int(found[2]) + 1}."),
        (r"\.conv_(pw|dw)\.", r".conv_\1.0."),
        (r"\.conv_pwl\.", ".conv_pw2.0."),
        (r"\.bn1\.", ".conv_pw.1."),
        (r"\.bn2\.", ".conv_dw.1."),
        (r"\.bn3\.", ".conv_pw2.1."),
        (r"^stages\.", "layers."),
    ],
    "vim": [
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^norm\.", "norm_f."),
        (r"\.mixer\.mixer\.ahead\.(?:scan\.)?", ".mixer."),
        (r"\.mixer\.mixer\.back\.(?:scan\.)?(conv|x_proj|dt)", r".mixer.\1_b"),
        (r"\.mixer\.mixer\.back\.scan\.A_log", ".mixer.A_b_log"),
        (r"\.mixer\.mixer\.back\.scan\.D", ".mixer.D_b"),
        (r"\.conv(_b)?\.", r".conv1d\1."),
        (r"\.dt(_b)?_(weight|bias)$", r".dt_proj\1.\2"),
        (r"^blocks\.", "layers."),
    ],
}


def layouts(name: str, classes: int = 5, **arguments: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dict of a model with random values, in the layout of the authors and in ours."""
    family = next(family for family in TO_OFFICIAL if timm.list_models(name, module=family))
    theirs, ours = {}, {}
    for key, value in timm.create_model(name, num_classes=classes, **arguments).state_dict().items():
        if value.is_floating_point():
            value = value + 0.1 * torch.rand_like(value)
        ours[key] = value
        if family == "vim" and ".scan." in key and not key.endswith("x_proj.weight"):
            value = value[0]
        elif family == "vim" and key.endswith("back.conv.weight"):
            value = value.flip(-1)
        elif key.endswith(("scan.A_log", "scan.D")):
            value = value.flatten(0, 1)
        elif key.endswith("scan.x_proj.weight") and family != "vim":
            value = value.unflatten(0, (4, -1))
        for pattern, replacement in TO_OFFICIAL[family]:
            key = re.sub(pattern, replacement, key)
        theirs[key] = value
    return theirs, ours


def official(name: str, classes: int = 5) -> dict[str, torch.Tensor]:
    return layouts(name, classes)[0]
