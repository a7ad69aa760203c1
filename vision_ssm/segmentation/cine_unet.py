"""CineUNet: a network that segments images, with layers over time between the frames of a film. Ours, from no paper."""
# Shapes: b films, t frames, k channels of a frame, h rows, w columns.

from collections.abc import Sequence

from torch import Tensor, nn

from vision_ssm.layers.convs5 import check_reset
from vision_ssm.layers.over_time import State
from vision_ssm.segmentation.unet import SSMUNet
from vision_ssm.video.mixers import TemporalMixer, temporal_mixer

__all__ = ["CineUNet"]


class CineUNet(nn.Module):
    """Segments each frame of a film, by that frame and those before.

    Encoder and decoder see single frames; at the levels that are named, layers over time stand between them.

    Args:
        net: the network of images.
        mixer: the layers over time, a name in ``TEMPORAL_MIXERS`` or a function of the width of a level; with
            "identity" it is ``net``, frame by frame.
        levels: where they stand, as indices of the net's ``reductions``: -1 is the coarsest map, 0 the skip at full
            resolution.

    Shapes: video (b, t, k, h, w) of any sizes >= 1 -> logits (b, t, classes, h, w), or a list of them as of the net's
    deep supervision, and the last state: that of the layers at each level. ``state`` goes on from an earlier part of
    the film. ``reset`` (b, t) is true where a new film begins. Films in pieces give what they give whole, but for the
    batch norms of a backbone that is trained.

    Raises:
        ValueError: a net of volumes, unknown mixer, levels that do not exist or come twice, a video of other axes or
            channels, a foreign state.
    """

    def __init__(self, net: SSMUNet, *, mixer: str | TemporalMixer = "convs5", levels: Sequence[int] = (-1,)) -> None:
        super().__init__()
        count = len(net.reductions)
        if len(net.reductions[0]) != 2:
            raise ValueError("the frames of a film are images; give a net with spatial_dims=2")
        self.levels = [level % count for level in levels if -count <= level < count]
        if len({*self.levels}) != len(levels):
            raise ValueError(f"levels must be different ones from {-count} to {count - 1}; got {tuple(levels)}")
        self.net = net
        self.over_time = nn.ModuleList(temporal_mixer(mixer, net.channels[level]) for level in self.levels)

    def forward(
        self, video: Tensor, state: tuple[State, ...] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor | list[Tensor], tuple[State, ...]]:
        if video.ndim != 5 or video.shape[2] != self.net.in_channels or 0 in video.shape:
            raise ValueError(
                f"video must be (films, frames, {self.net.in_channels}, height, width) and not empty; "
                f"got {tuple(video.shape)}"
            )
        if state is not None and len(state) != len(self.levels):
            raise ValueError(f"{len(self.levels)} levels need as many states; got {len(state)}. Is it another model's?")
        films, frames, _, *sizes = video.shape
        check_reset(reset, films, frames)
        maps = self.net.encode(video.transpose(0, 1).flatten(0, 1))
        last = []
        for level, stack, before in zip(self.levels, self.over_time, state or [None] * len(self.levels), strict=True):
            x = maps[level].movedim(1, -1).unflatten(0, (frames, films))
            x, after = stack(x, before, None if reset is None else reset.T)
            maps[level] = x.flatten(0, 1).movedim(-1, 1)
            last.append(after)
        logits = self.net.predict(maps, sizes)
        if isinstance(logits, Tensor):
            return films_first(logits, frames), tuple(last)
        return [films_first(m, frames) for m in logits], tuple(last)

    def step(
        self, frame: Tensor, state: tuple[State, ...] | None = None
    ) -> tuple[Tensor | list[Tensor], tuple[State, ...]]:
        """One frame (b, k, h, w) and the state before it -> logits (b, classes, h, w) and the next state."""
        logits, state = self(frame[:, None], state)
        return logits[:, 0] if isinstance(logits, Tensor) else [m[:, 0] for m in logits], state


def films_first(x: Tensor, frames: int) -> Tensor:
    """(t b, c, h, w), the films of each frame in turn, to (b, t, c, h, w)."""
    return x.unflatten(0, (frames, -1)).transpose(0, 1)
