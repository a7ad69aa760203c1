"""Backbones, registered with timm on import."""

import timm

from .efficient_vmamba import EfficientVMamba
from .hydra import HydraViT
from .vim import Vim
from .vim2 import ViM2
from .vmamba import VMamba

__all__ = ["FAMILIES", "EfficientVMamba", "HydraViT", "VMamba", "ViM2", "Vim", "list_models"]

FAMILIES = ("efficient_vmamba", "hydra", "vim", "vim2", "vmamba")
"""The modules of this package, as ``timm.list_models(module=...)`` names them."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of this package's models in timm that match ``pattern``."""
    return sorted(name for family in FAMILIES for name in timm.list_models(pattern, module=family))
