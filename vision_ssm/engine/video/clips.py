"""Tasks on clips that are whole: which class they show, and the class of every pixel of their frames."""
# Shapes: b clips, t frames, k channels of a frame, h rows, w columns.

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor

from vision_ssm.engine.tasks import Mode
from vision_ssm.segmentation import CineUNet
from vision_ssm.video import ClipClassifier

__all__ = ["CineSegmentation", "ClipClassification"]


class ClipClassification(BaseModel):
    """A class for every clip, by all of its frames.

    Args:
        net: videos (b, t, k, h, w) -> logits (b, t, classes) of the clips up to each frame, and a state.
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, net: ClipClassifier, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing

    def forward(self, video: Tensor, label: Tensor | None = None, mode: Mode = "tensor") -> Any:
        logits = self.net(video)[0][:, -1]
        if mode == "tensor":
            return logits
        if mode == "loss":
            assert label is not None, "a loss needs labels"
            return {"loss": F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)}
        targets = [None] * len(video) if label is None else label
        return [{"prediction": one, "label": target} for one, target in zip(logits.argmax(dim=1), targets, strict=True)]


class CineSegmentation(BaseModel):
    """A class for every pixel of every frame; frames that have labels train and are scored.

    Args:
        net: videos (b, t, k, h, w) -> logits (b, t, classes, h, w), and a state.
        loss: of logits (n, classes, h, w) and labels (n, 1, h, w) of n frames, in float32.
        augment: random variants of a training batch, applied in turn: (image, label) -> (image, label). They see the
            frames of a clip as channels of one image, so that all are changed alike.

    Labels are (b, t, 1, h, w), negative in all of a frame that has none. What else items hold, ``spacing``, is left.

    Raises:
        ValueError: a batch to train on has no label.
    """

    def __init__(
        self,
        net: CineUNet,
        loss: Callable[[Tensor, Tensor], Tensor],
        augment: Sequence[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.augment = tuple(augment)

    def forward(
        self, video: Tensor, label: Tensor | None = None, spacing: Tensor | None = None, mode: Mode = "tensor"
    ) -> Any:
        if mode == "loss":
            assert label is not None, "a loss needs labels"
            video, label = self.varied(video, label)
            labelled = has_labels(label)
            if not labelled.any():
                raise ValueError("no frame of these clips has labels; train on clips that have some")
            logits, _ = self.net(video)
            return {"loss": self.loss(logits[labelled].float(), label[labelled])}
        logits, _ = self.net(video)
        if mode == "tensor":
            return logits
        classes = logits.argmax(dim=2, keepdim=True)
        if label is None:
            return [{"prediction": across(one), "label": None} for one in classes]
        pairs = zip(classes, label, has_labels(label), strict=True)
        return [{"prediction": across(one[known]), "label": across(target[known])} for one, target, known in pairs]

    def varied(self, video: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """A random variant of each clip and its labels."""
        image, target = video.flatten(1, 2), label.flatten(1, 2).to(video.dtype)
        for variant in self.augment:
            image, target = variant(image, target)
        return image.view_as(video), target.view_as(label).to(label.dtype)


def has_labels(label: Tensor) -> Tensor:
    """Which frames (b, t) have labels (b, t, 1, h, w)."""
    return (label >= 0).flatten(2).all(dim=2)


def across(frames: Tensor) -> Tensor:
    """Frames (n, 1, h, w) as a volume (1, h, w, n), which metrics of volumes take."""
    return frames.permute(1, 2, 3, 0)
