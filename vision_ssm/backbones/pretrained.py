"""A backbone of this package with weights of timm or of a file, all of them or an error."""

from os import PathLike
from pathlib import Path
from typing import Any, Literal

import timm
from torch import nn

from vision_ssm.model_zoo.checkpoints import classes, read, to_ours
from vision_ssm.model_zoo.converters import unwrapped

__all__ = ["create_pretrained"]


def create_pretrained(name: str, weights: Literal[True] | str | PathLike[str], **arguments: Any) -> nn.Module:
    """timm's model ``name``, complete with its classifier.

    Args:
        name: timm name of a model of this package.
        weights: True for the weights that timm knows, or a ``.safetensors`` or PyTorch file in the official layout or
            ours, of as many classes as it has. The first convolution is adapted to ``in_chans``, nothing else.
        **arguments: passed whole to ``timm.create_model``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read or holds no weights.
        RuntimeError: there are no weights, or they do not fit; all keys are listed.
    """
    if weights is True:
        return timm.create_model(name, pretrained=True, **arguments)
    state = dict(unwrapped(to_ours(read(Path(weights)))))
    if not state:  # timm would take its own instead
        raise ValueError(f"{weights} holds no weights")
    number = classes(state, name)
    source = {"state_dict": state, "num_classes": number}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=number, **arguments)
