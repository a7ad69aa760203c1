"""Next-frame prediction as a task, and how well generated frames match those that came."""
# Shapes: b clips, t frames, k channels of a frame, h rows, w columns. Frames of clips have values in [-1, 1].

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from monai.metrics.regression import compute_ssim_and_cs
from torch import Tensor

from vision_ssm.engine.tasks import Mode
from vision_ssm.layers.over_time import State
from vision_ssm.video import pixel_loss

__all__ = [
    "QUALITIES",
    "FrameMSE",
    "FramePSNR",
    "FramePrediction",
    "FrameSSIM",
    "mse",
    "psnr",
    "require_next",
    "ssim",
    "unit",
]

SSIM_WINDOW = (11, 1.5)  # pixels, and the standard deviation of its Gaussian


class FrameModel(Protocol):
    """A network that predicts frames, as :class:`vision_ssm.video.NextFrame` does; frames have ``channels``."""

    channels: int

    def __call__(self, frames: Tensor, actions: Tensor | None = None) -> tuple[Tensor, State]: ...

    def stream(self, context: Tensor, *, actions: Tensor | None = None) -> Iterator[tuple[Tensor, State]]: ...

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


class FramePrediction(BaseModel):
    """The frames that follow a clip.

    Trained to predict each next frame from those before; tested by frames generated after a context.

    Args:
        net: the model that is trained.
        context: frames of a test clip that generation begins with; all others are generated.
        loss: of predicted and true frames (b, t, k, h, w), in float32.
        grad_checkpointing: compute most of the forward again in the backward, instead of keeping it.

    Raises:
        ValueError: ``context`` is no number of frames.
    """

    def __init__(
        self,
        net: FrameModel,
        *,
        context: int,
        loss: Callable[[Tensor, Tensor], Tensor] = pixel_loss,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(context, int) or context < 1:
            raise ValueError(f"context must be at least 1 frame, and a whole number; got {context!r}")
        net.set_grad_checkpointing(grad_checkpointing)
        self.net: FrameModel = net
        self.context = context
        self.loss = loss

    def forward(self, video: Tensor, actions: Tensor | None = None, mode: Mode = "tensor") -> Any:
        if mode == "predict":
            generated = torch.stack(list(self.rollout(video, actions)), dim=1)
            pairs = zip(generated, video[:, self.context :], strict=True)
            return [{"prediction": prediction, "truth": truth} for prediction, truth in pairs]
        require_next(video)
        prediction, _ = self.net(video[:, :-1], None if actions is None else actions[:, 1:])
        if mode == "tensor":
            return prediction
        return {"loss": self.loss(prediction.float(), video[:, 1:])}

    def rollout(self, video: Tensor, actions: Tensor | None = None) -> Iterator[Tensor]:
        """A generated frame (b, k, h, w) for each frame of the clips after the context, one by one.

        Raises:
            ValueError: no frame comes after the context; or clip and actions do not fit the network.
        """
        frames = self.frames_after(video.shape[1])
        stream = self.net.stream(video[:, : self.context], actions=actions)
        return (frame for frame, _ in islice(stream, frames))

    def check_item(self, item: Mapping[str, Tensor]) -> None:
        self.frames_after(len(item["video"]))

    def frames_after(self, length: int) -> int:
        """How many of ``length`` frames come after the context, or the ValueError that there is none."""
        if length <= self.context:
            raise ValueError(
                f"the clip has {length} frames, the context is {self.context}: none is left to predict; give "
                "longer clips or set a shorter model.context"
            )
        return length - self.context


def require_next(video: Tensor) -> None:
    """Raises ValueError unless clips (b, t, k, h, w) have a frame that follows another."""
    if video.shape[1] < 2:
        raise ValueError("clips of one frame have none that follows; train on clips of 2 frames or more")


def unit(frames: Tensor) -> Tensor:
    """Frames with values in [-1, 1] as float32 in [0, 1], in which qualities are measured."""
    return (frames.float() + 1) / 2


def mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of frames in [0, 1], (n, k, h, w) twice -> (n,)."""
    return (prediction - truth).square().mean(dim=(1, 2, 3))


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of frames in [0, 1], (n, k, h, w) twice -> (n,); infinite where they agree."""
    return -10 * mse(prediction, truth).log10()


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of frames in [0, 1] over all places of an 11 x 11 window, (n, k, h, w) twice -> (n,).

    Raises:
        ValueError: the frames are smaller than the window.
    """
    size, deviation = SSIM_WINDOW
    if min(prediction.shape[2:]) < size:
        raise ValueError(f"SSIM needs frames of {size} x {size} pixels or more; got {tuple(prediction.shape[2:])}")
    similarity, _ = compute_ssim_and_cs(prediction, truth, 2, (size, size), (deviation, deviation))
    return similarity.mean(dim=(1, 2, 3))


Quality = Callable[[Tensor, Tensor], Tensor]
QUALITIES: Mapping[str, Quality] = {"mse": mse, "psnr": psnr, "ssim": ssim}
"""How well a frame matches the true one: from frames (n, k, h, w) in [0, 1] twice to (n,)."""


class FrameQuality(BaseMetric):
    """The quality of generated frames that ``default_prefix`` names: its mean over clips and frames.

    Args:
        frames: numbers of generated frames, from 1, whose mean over clips is given too.
    """

    def __init__(self, frames: Sequence[int] = ()) -> None:
        super().__init__()
        self.frames = tuple(frames)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        for sample in data_samples:
            prediction, truth = (unit(sample[key]) for key in ("prediction", "truth"))
            if max(self.frames, default=1) > len(truth):
                raise ValueError(
                    f"frame {max(self.frames)} after the context is to be measured, but clips have {len(truth)} there"
                )
            self.results.append(QUALITIES[self.default_prefix](prediction, truth).tolist())

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        curve = torch.tensor(results).mean(dim=0)
        chosen = {str(frame): float(curve[frame - 1]) for frame in self.frames}
        return {"mean": float(curve.mean()), **chosen}


class FrameMSE(FrameQuality):
    """Mean squared error of frames in [0, 1]."""

    default_prefix = "mse"


class FramePSNR(FrameQuality):
    """Peak signal-to-noise ratio in dB."""

    default_prefix = "psnr"


class FrameSSIM(FrameQuality):
    """Structural similarity."""

    default_prefix = "ssim"
