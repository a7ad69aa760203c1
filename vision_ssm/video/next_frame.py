"""Next-frame prediction in pixels: layers over time between an encoder and a decoder of single frames.

Encoder, decoder, actions and loss as in Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal
Modeling", NeurIPS 2023, arXiv:2310.19694, on Moving-MNIST. Frames have values in [-1, 1].
"""

# Shapes: b clips, t frames, k channels of a frame, h rows, w columns, c channels of the layers.

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.layers.norm_act import norm_act
from vision_ssm.layers.over_time import EPS
from vision_ssm.video.next_map import NextMap

GROUPS = 32  # of the norms in encoder and decoder


def pixel_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the squared and half the absolute error, summed over width and channels, averaged over all else.

    Shapes: two clips (b, t, k, h, w) -> ().
    """
    error = prediction - target
    return (0.5 * error**2 + 0.5 * error.abs()).sum(dim=(2, 4)).mean()


class ResNetUnit(nn.Module):
    """x + 0.1 conv(ELU(norm(conv(ELU(norm(x)))))), the skip a 1x1 convolution where the width changes.

    Shapes: (n, width, h, w) -> (n, out, h, w).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(GROUPS, width, eps=EPS),
            nn.ELU(),
            nn.Conv2d(width, out, 3, padding=1),
            nn.GroupNorm(GROUPS, out, eps=EPS),
            nn.ELU(),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.inner
        norm1, act1, conv1, norm2, act2, conv2 = parts
        inner = conv2(norm_act(norm2, act2, conv1(norm_act(norm1, act1, x))))
        return torch.add(self.skip(x), inner, alpha=0.1)


class Doubling(nn.Module):
    """Each cell as four, in the maps' own dtype: autocast would widen those of ``nn.UpsamplingNearest2d`` to float32.

    Shapes: (n, c, h, w) -> (n, c, 2 h, 2 w), channels last.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        cells = x.movedim(1, -1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
        return cells.reshape(n, 2 * h, 2 * w, c).movedim(-1, 1)


class CellNorm(nn.LayerNorm):
    """Norm over the channels of each cell: (n, c, h, w) -> (n, c, h, w).

    The cells are a list meanwhile: a map with channels last, of four axes beside convolutions, inductor would lay out
    anew, as if rows were its channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def frame_encoder(channels: int, widths: Sequence[int], units: int) -> nn.Sequential:
    """A convolution and a unit, then for each further width a halved map and ``units`` units."""
    parts: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), ResNetUnit(widths[0], widths[0])]
    for before, width in pairwise(widths):
        parts += [nn.AvgPool2d(2), ResNetUnit(before, width), *(ResNetUnit(width, width) for _ in range(units - 1))]
    return nn.Sequential(*parts)


def frame_decoder(dim: int, widths: Sequence[int], units: int, channels: int) -> nn.Sequential:
    """A convolution to the first width, then from the last width to the first ``units`` units, maps doubled between."""
    parts: list[nn.Module] = [nn.Conv2d(dim, widths[0], 3, padding=1)]
    before = widths[0]
    for width in reversed(widths):
        if len(parts) > 1:
            parts.append(Doubling())
        parts += [ResNetUnit(before, width), *(ResNetUnit(width, width) for _ in range(units - 1))]
        before = width
    return nn.Sequential(*parts, CellNorm(before, eps=EPS), nn.Conv2d(before, channels, 1))


def check_widths(encoder: Sequence[int], decoder: Sequence[int]) -> None:
    """Raises ValueError unless both have widths, as many as each other, that the norms can take."""
    wrong = [width for width in (*encoder, *decoder) if width < 1 or width % GROUPS]
    if wrong or not encoder or len(encoder) != len(decoder):
        raise ValueError(
            f"encoder and decoder need as many widths as each other, multiples of {GROUPS}; "
            f"got {tuple(encoder)} and {tuple(decoder)}"
        )


def check_frames(frames: Tensor, channels: int, stride: int) -> None:
    """Raises ValueError unless clips (b, t, k, h, w) have these channels and maps that the encoder can halve."""
    if frames.ndim != 5 or frames.shape[2] != channels or 0 in frames.shape:
        raise ValueError(
            f"frames must be (clips, frames, {channels}, height, width) and not empty; got {tuple(frames.shape)}"
        )
    if not frames.is_floating_point():
        raise ValueError(
            f"frames must be numbers from -1 to 1; got {frames.dtype}. Divide bytes by 127.5 and subtract 1"
        )
    size = tuple(frames.shape[3:])
    if any(pixels % stride for pixels in size):
        raise ValueError(f"height and width must be multiples of {stride}; got {size}. Pad the frames")


class NextFrame(NextMap):
    """Predicts each next frame of a clip: encoder, layers over time, decoder, tanh.

    Args:
        stack: the layers over time, as for :class:`NextMap`.
        channels: channels k of a frame.
        dim: channels c of the layers.
        encoder: widths of the encoder; every one after the first halves the map.
        decoder: widths of the decoder, in the encoder's order.
        units: residual units at each width of encoder and decoder.
        actions: number of actions; 1 where there are none.
        action_dim: width of an action's embedding.

    Shapes: frames (b, t, k, h, w) with values in [-1, 1] -> the frames that follow each, alike, and the last state.
    ``actions`` (b, t), ``state`` and ``reset`` (b, t) as for :class:`NextMap`.

    Raises:
        ValueError: sizes that do not fit, frames or actions out of shape, an action out of range, a foreign state.
    """

    def __init__(
        self,
        stack: nn.Module,
        channels: int = 1,
        *,
        dim: int,
        encoder: Sequence[int] = (64, 128, 256),
        decoder: Sequence[int] = (64, 128, 256),
        units: int = 1,
        actions: int = 1,
        action_dim: int = 1,
    ) -> None:
        check_widths(encoder, decoder)
        if min(channels, units) < 1:
            raise ValueError(f"channels and units must be at least 1; got channels={channels}, units={units}")
        super().__init__(
            stack,
            frame_encoder(channels, encoder, units),
            nn.Sequential(*frame_decoder(dim, decoder, units, channels), nn.Tanh()),
            width=encoder[-1],
            dim=dim,
            actions=actions,
            action_dim=action_dim,
        )
        self.channels, self.stride = channels, 2 ** (len(encoder) - 1)

    def check_maps(self, maps: Tensor) -> None:
        check_frames(maps, self.channels, self.stride)
        dtype = self.join.weight.dtype
        if torch.float64 in (maps.dtype, dtype) and maps.dtype != dtype:  # as NumPy makes them; autocast leaves them
            raise ValueError(f"the frames are {maps.dtype}, the model's weights {dtype}; convert the frames")

    def choose(self, prediction: Tensor) -> Tensor:
        return prediction
