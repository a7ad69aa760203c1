"""timm's builder, on a device and in a dtype."""

from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg
from torch import nn

__all__ = ["build"]

Model = TypeVar("Model", bound=nn.Module)


def build(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Model:
    """The model that timm builds of ``config``, made on ``device`` and then cast to ``dtype``.

    No layer takes either: torch's device context reaches all of them, those of timm too. On the device "meta" nothing
    is drawn, and ``load_state_dict(..., assign=True)`` fills the model.
    """
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(model_cls, variant, pretrained, **config)
    return model if dtype is None else model.to(dtype)
