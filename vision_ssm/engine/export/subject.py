"""What is exported: a backbone or the network of a config, and what its file says of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from torch import nn

from vision_ssm._version import __version__
from vision_ssm.engine.checkpoint import load_into, read_state
from vision_ssm.engine.config import build, config_name
from vision_ssm.model_zoo import checkpoints

__all__ = ["Subject", "backbone", "network"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to export and what its file says of it.

    Attributes:
        net: in evaluation mode, on the CPU.
        name: of the model or config.
        channels: of its input.
        sizes: of its input, such as height and width, where they are fixed.
        classes: names of the outputs, or how many there are.
        mean, std: of each channel, with which images were normalised; empty if a config prepares them otherwise.
        weights: where they are from.
        least: the smallest side that one program for many sizes is right for. A network that pads every image to whole
            cells of its coarsest map pads one that is a single cell further, which is another program.
    """

    net: nn.Module
    name: str
    channels: int
    sizes: tuple[int, ...]
    classes: tuple[str, ...] | int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights: str
    least: int = 1


def backbone(name: str, checkpoint: Path | None, sizes: Sequence[int] = (), **options: Any) -> Subject:
    """A registered backbone with the weights of a file; random ones for None.

    Args:
        sizes: height and width; those of its configuration by default.
        **options: arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError, ValueError: unknown model, or the file is missing, damaged or of another model.
    """
    checkpoints.require_own(name)
    net: Any  # has what timm gives every model
    if checkpoint is None:
        net = stirred(timm.create_model(name, **options))
    else:
        state = checkpoints.read(checkpoint)
        net = timm.create_model(name, **{"num_classes": checkpoints.classes(state, name), **options})
        checkpoints.load(net, state)
    config = net.pretrained_cfg
    return Subject(
        net=net.eval(),
        name=name,
        channels=net.in_chans,
        sizes=tuple(sizes) or tuple(config["input_size"][1:]),
        classes=net.num_classes,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        weights="random" if checkpoint is None else checkpoint.name,
    )


def network(config: Config, checkpoint: Path | None, sizes: Sequence[int] = ()) -> Subject:
    """The network of a config with the weights of a file; random ones for None.

    Args:
        sizes: of the input, one for each axis; those of the config's windows by default.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or of another model, or there is no size.
    """
    net: Any = build(config.model).net
    if checkpoint is None:
        stirred(net)
    else:
        load_into(net, read_state(checkpoint), checkpoint)
    about = config.model.net
    channels = about.get("in_channels", about.get("in_chans"))
    sizes = tuple(sizes) or tuple(config.model.get("inferer", {}).get("roi_size", ()))
    if not sizes or channels is None:
        raise ValueError(f"config {config_name(config)} does not say what its network takes; give --size, one an axis")
    return Subject(
        net=net.eval(),
        name=config_name(config),
        channels=channels,
        sizes=sizes,
        classes=tuple(config.get("classes", ())),
        weights="random" if checkpoint is None else checkpoint.name,
        least=max(net.reductions[-1]) + 1 if hasattr(net, "reductions") else 1,
    )


@torch.no_grad()
def stirred(net: nn.Module) -> nn.Module:
    """A net with noise in its weights: what scans add to a map is little at first, and an error in it would be lost."""
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def metadata(subject: Subject, sides: tuple[int, int] | None) -> str:
    """What a file says of itself, as JSON."""
    sizes: dict[str, Any] = {"sizes": list(subject.sizes)} if sides is None else {"sides": list(sides)}
    return json.dumps(
        {
            "model": subject.name,
            "weights": subject.weights,
            "package": f"vision_ssm {__version__}",
            "torch": str(torch.__version__),
            "input": {"channels": subject.channels, "axes": len(subject.sizes), **sizes},
            "mean": subject.mean,
            "std": subject.std,
            "classes": subject.classes,
        }
    )
