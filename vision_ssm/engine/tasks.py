"""Tasks: what a network is trained for. Each wraps one network and gives the Runner a loss or predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

__all__ = ["ChecksItems", "Classification", "Segmentation"]

Mode = Literal["tensor", "loss", "predict"]


@runtime_checkable
class ChecksItems(Protocol):
    """A task that knows what it cannot be tested on, so that training does not begin before that is found out."""

    def check_item(self, item: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless an item of a test set can be predicted."""


class Segmentation(BaseModel):
    """A class for every voxel.

    Args:
        net: (b, c, h, w) -> logits (b, classes, h, w), or a list of them while training with deep supervision.
        loss: of the network's output and labels (b, 1, h, w).
        inferer: MONAI inferer that runs the network over a volume (b, c, x, y, z).
        augment: random variants of a training batch, applied in turn: (image, label) -> (image, label).
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[..., Tensor],
        inferer: Callable[..., Tensor],
        augment: Sequence[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.inferer = inferer
        self.augment = tuple(augment)

    def forward(self, image: Tensor, label: Tensor | None = None, mode: Mode = "tensor") -> Any:
        if mode == "tensor":
            return self.net(image)
        if mode == "loss":
            assert label is not None, "a loss needs labels"
            for variant in self.augment:
                image, label = variant(image, label)
            return {"loss": self.loss(self.net(image), label)}
        prediction = self.label_map(image)
        targets = [None] * len(image) if label is None else label
        return [{"prediction": one, "label": target} for one, target in zip(prediction, targets, strict=True)]

    def label_map(self, image: Tensor) -> Tensor:
        """Volume (b, c, x, y, z) -> classes (b, 1, x, y, z)."""
        return self.inferer(image, self.net).argmax(dim=1, keepdim=True)


class Classification(BaseModel):
    """A class for every image.

    Args:
        net: (b, c, h, w) -> logits (b, classes).
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, net: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing

    def forward(self, image: Tensor, label: Tensor | None = None, mode: Mode = "tensor") -> Any:
        logits = self.net(image)
        if mode == "tensor":
            return logits
        if mode == "loss":
            assert label is not None, "a loss needs labels"
            return {"loss": F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)}
        prediction = logits.argmax(dim=1)
        targets = [None] * len(image) if label is None else label
        return [{"prediction": one, "label": target} for one, target in zip(prediction, targets, strict=True)]


def count_parameters(net: nn.Module) -> int:
    """Trainable parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def input_channels(item: Mapping[str, Tensor]) -> int:
    """Channels of an item as a network sees it: of its ``image`` (c, ...), or its ``video`` (t, c, h, w)."""
    return len(item["image"]) if "image" in item else item["video"].shape[1]
