"""Backbones, registered with timm on import."""

import timm

from .vmamba import VMamba

__all__ = ["FAMILIES", "VMamba", "list_models"]

FAMILIES = ("vmamba",)
"""The modules of this package, as ``timm.list_models(module=...)`` names them."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of this package's models in timm that match ``pattern``."""
    return sorted(name for family in FAMILIES for name in timm.list_models(pattern, module=family))
