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
    features: dict[str, Any],
    feature_cfg: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Model:
    """timm's builder. The model is made on ``device`` and then cast to ``dtype``.

    No layer takes either: torch's device context reaches all of them, those of timm too. On the device "meta" nothing
    is drawn, and ``load_state_dict(..., assign=True)`` fills the model.

    Args:
        model_cls: the backbone.
        variant: its timm name.
        pretrained: load the weights of its configuration.
        features: how ``features_only`` wraps it, as timm's ``feature_cfg``.
        feature_cfg: entries in place of those of ``features``.
        device: where the model is made.
        dtype: of its parameters and buffers.
        **config: arguments of ``timm.models.build_model_with_cfg`` and of the backbone.

    Raises:
        RuntimeError: the pretrained weights do not exist, cannot be fetched or do not fit.
    """
    try:
        with nullcontext() if device is None else torch.device(device):
            model = build_model_with_cfg(
                model_cls, variant, pretrained, feature_cfg={**features, **(feature_cfg or {})}, **config
            )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"pretrained weights of {variant}: {error}\n`vision-ssm zoo list` says where weights are published; "
            "a file of them is read by timm.create_model(..., checkpoint_path=FILE)"
        ) from error
    return model if dtype is None else model.to(dtype)
