"""Classes of clips: layers over time on the feature map of any timm backbone. Ours, from no paper."""

# Shapes: b clips, t frames, k channels of a frame, h rows, w columns, c channels of the layers.

from typing import Any, cast

import timm
from torch import Tensor, nn

from vision_ssm.layers.convs5 import check_reset
from vision_ssm.layers.over_time import EPS, State
from vision_ssm.video.mixers import TemporalMixer, temporal_mixer


class ClipClassifier(nn.Module):
    """Says at each frame of a clip which class it is of, by the frames so far.

    A feature map of each frame, a projection, layers over time, norm, mean over the map, and a linear classifier.

    Args:
        backbone: name of a timm model that supports ``features_only``.
        in_channels: channels k of a frame.
        classes: how many.
        dim: channels c of the layers.
        mixer: the layers over time, a name in ``TEMPORAL_MIXERS`` or a function of their width; with "identity" each
            frame is judged by itself.
        out_index: which of the backbone's maps is read; the last by default.
        **backbone_arguments: passed whole to ``timm.create_model``, such as ``pretrained=True`` or ``img_size=64``.

    Shapes: video (b, t, k, h, w) -> logits (b, t, classes), of the clip up to each frame, and the last state. ``state``
    goes on from an earlier part of the clip. ``reset`` (b, t) is true where a new clip begins. Clips in pieces give
    what they give whole, but for the batch norms of a backbone that is trained.

    Raises:
        ValueError: unknown mixer, sizes that do not fit, a video of other axes or channels, a foreign state.
    """

    def __init__(
        self,
        backbone: str,
        *,
        in_channels: int,
        classes: int,
        dim: int = 128,
        mixer: str | TemporalMixer = "convs5",
        out_index: int = -1,
        **backbone_arguments: Any,
    ) -> None:
        super().__init__()
        if min(in_channels, classes) < 1:
            raise ValueError(
                f"in_channels and classes must be at least 1; got in_channels={in_channels}, classes={classes}"
            )
        self.in_channels = in_channels
        options: dict[str, Any] = {"features_only": True, "in_chans": in_channels, "out_indices": (out_index,)}
        try:
            self.backbone = timm.create_model(backbone, **options, **backbone_arguments)
        except IndexError as error:
            raise ValueError(f"{backbone} has no map of out_index {out_index}; give one that it has") from error
        self.channels_last = self.backbone.output_fmt == "NHWC"
        info: Any = self.backbone.feature_info
        self.project = nn.Linear(info.channels()[-1], dim)
        self.stack = temporal_mixer(mixer, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, classes)

    def forward(self, video: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if video.ndim != 5 or video.shape[2] != self.in_channels or 0 in video.shape:
            raise ValueError(
                f"video must be (clips, frames, {self.in_channels}, height, width) and not empty; "
                f"got {tuple(video.shape)}"
            )
        clips, frames = video.shape[:2]
        check_reset(reset, clips, frames)
        (fmap,) = self.backbone(video.transpose(0, 1).flatten(0, 1))
        x = self.project(fmap if self.channels_last else fmap.movedim(1, -1))
        x, state = self.stack(x.unflatten(0, (frames, clips)), state, None if reset is None else reset.T)
        return self.head(self.norm(x).mean(dim=(2, 3))).transpose(0, 1), cast(State, state)

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One frame (b, k, h, w) and the state before it -> logits (b, classes) and the next state."""
        logits, state = self(frame[:, None], state)
        return logits[:, 0], state
