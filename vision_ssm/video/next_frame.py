"""Next-frame prediction in pixels: layers over time between an encoder and a decoder of single frames.

Encoder, decoder, actions and loss as in Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal
Modeling", NeurIPS 2023, arXiv:2310.19694, on Moving-MNIST. Frames have values in [-1, 1].
"""

# Shapes: b clips, t frames, k channels of a frame, h rows, w columns, c channels of the layers.

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vision_ssm.layers.convs5 import EPS, State

GROUPS = 32  # of the norms in encoder and decoder
MASKED = -1  # the action of a frame whose action is not known


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
        return self.skip(x) + 0.1 * self.inner(x)


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
            parts.append(nn.UpsamplingNearest2d(scale_factor=2))
        parts += [ResNetUnit(before, width), *(ResNetUnit(width, width) for _ in range(units - 1))]
        before = width
    return nn.Sequential(*parts, LayerNorm2d(before, eps=EPS), nn.Conv2d(before, channels, 1))


class NextFrame(nn.Module):
    """Predicts each next frame of a clip: encoder, layers over time, decoder, tanh.

    Training takes whole clips at once; generation feeds each predicted frame back, and nothing but the state of the
    layers is remembered.

    Args:
        stack: the layers over time: from inputs (t, b, h', w', c), a state or none, and resets (t, b) or none to
            outputs of the inputs' shape and the last state, a tuple of tensors.
        channels: channels k of a frame.
        dim: channels c of the layers.
        encoder: widths of the encoder; every one after the first halves the map.
        decoder: widths of the decoder, in the encoder's order.
        units: residual units at each width of encoder and decoder.
        actions: number of actions; 1 where there are none.
        action_dim: width of an action's embedding.

    Shapes: frames (b, t, k, h, w) with values in [-1, 1] -> the frames that follow each, alike, and the last state.
    ``actions`` (b, t) are those that lead to the frames that follow, from 0 to ``actions`` - 1, or -1 for unknown; all
    0 by default. ``state`` goes on from an earlier part of the clip. ``reset`` (b, t) is true where a new clip begins.

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
        super().__init__()
        wrong = [width for width in (*encoder, *decoder) if width % GROUPS]
        if wrong or not encoder or len(encoder) != len(decoder):
            raise ValueError(
                f"encoder and decoder need as many widths as each other, multiples of {GROUPS}; "
                f"got {tuple(encoder)} and {tuple(decoder)}"
            )
        if min(channels, units, actions, action_dim) < 1:
            raise ValueError(
                "channels, units, actions and action_dim must be at least 1; "
                f"got channels={channels}, units={units}, actions={actions}, action_dim={action_dim}"
            )
        self.channels, self.actions, self.stride = channels, actions, 2 ** (len(encoder) - 1)
        self.encoder = frame_encoder(channels, encoder, units)
        self.action = nn.Embedding(actions + 1, action_dim)  # the last row is the unknown action
        self.join = nn.Conv2d(encoder[-1] + action_dim, dim, 1)
        self.stack = stack
        self.decoder = frame_decoder(dim, decoder, units, channels)

    def forward(
        self,
        frames: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        self._check(frames, actions)
        x = self._encode(frames, actions)
        x, state = self.stack(x, state, None if reset is None else reset.T)
        return self._decode(x), state

    def step(self, frame: Tensor, action: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """One frame (b, k, h, w) and the action (b,) that follows it -> the next frame, alike, and the next state."""
        y, state = self(frame[:, None], None if action is None else action[:, None], state)
        return y[:, 0], state

    def stream(
        self, context: Tensor, *, actions: Tensor | None = None, state: State | None = None
    ) -> Iterator[tuple[Tensor, State]]:
        """Generates frames one by one, without gradients and in constant memory.

        Args:
            context: the frames so far, (b, t, k, h, w), t >= 1; all at once go through the layers.
            actions: the action that leads to each frame, those of the context first, (b, t + n); the first is not used.
                Without actions the stream has no end.
            state: the state before the context.

        Yields:
            The next frame (b, k, h, w), and the state before it: to go on from there, pass the frame as context and
            this state.

        Raises:
            ValueError: before the first frame, where frames, actions or state do not fit.
        """
        self._check(context, actions, beyond=True)
        return self._roll(context, actions, state)

    def generate(
        self, context: Tensor, frames: int, *, actions: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """The ``frames`` frames after a context, (b, frames, k, h, w), and the state before the last; see ``stream``.

        Raises:
            ValueError: as ``stream``; or no frame is asked for, or actions are not one for each frame.
        """
        if frames < 1:
            raise ValueError(f"frames must be at least 1; got {frames}")
        stream = self.stream(context, actions=actions, state=state)
        total = context.shape[1] + frames
        if actions is not None and actions.shape[1] != total:
            raise ValueError(
                f"actions must be one for each of {total} frames, context included; got {actions.shape[1]}"
            )
        found = None
        for i, (frame, after) in enumerate(islice(stream, frames)):
            if found is None:
                found = frame.new_empty(frame.shape[0], frames, *frame.shape[1:])
            found[:, i], state = frame, after
        assert found is not None and state is not None
        return found, state

    @torch.no_grad()
    def _roll(self, context: Tensor, actions: Tensor | None, state: State | None) -> Iterator[tuple[Tensor, State]]:
        ahead = context.shape[1] + 1
        x = self._encode(context, None if actions is None else actions[:, 1:ahead])
        x, state = self.stack(x, state)
        frame = self._decode(x[-1:])[:, 0]
        while True:
            yield frame, state
            if actions is not None and ahead == actions.shape[1]:
                return
            frame, state = self.step(frame, None if actions is None else actions[:, ahead], state)
            ahead += 1

    def _encode(self, frames: Tensor, actions: Tensor | None) -> Tensor:
        """Frames (b, t, k, h, w) and actions (b, t) to inputs of the layers (t, b, h', w', c)."""
        clips, length = frames.shape[:2]
        x = self.encoder(frames.transpose(0, 1).flatten(0, 1))
        if actions is None:
            embedded = self.action.weight[:1].expand(len(x), -1)
        else:
            embedded = self.action((actions.T.flatten() % (self.actions + 1)).long())  # -1 is the last row
        x = self.join(torch.cat([x, embedded[..., None, None].expand(-1, -1, *x.shape[2:])], dim=1))
        return x.movedim(1, -1).unflatten(0, (length, clips))

    def _decode(self, x: Tensor) -> Tensor:
        """Outputs of the layers (t, b, h', w', c) to frames (b, t, k, h, w)."""
        y = torch.tanh(self.decoder(x.flatten(0, 1).movedim(-1, 1)))
        return y.unflatten(0, x.shape[:2]).transpose(0, 1)

    def _check(self, frames: Tensor, actions: Tensor | None, *, beyond: bool = False) -> None:
        """Raises ValueError unless the frames fit and each has an action that exists, and frames ``beyond`` them."""
        if frames.ndim != 5 or frames.shape[2] != self.channels or 0 in frames.shape:
            raise ValueError(
                f"frames must be (clips, frames, {self.channels}, height, width) and not empty; "
                f"got {tuple(frames.shape)}"
            )
        clips, length, _, *size = frames.shape
        if any(pixels % self.stride for pixels in size):
            raise ValueError(f"height and width must be multiples of {self.stride}; got {tuple(size)}. Pad the frames")
        if actions is None:
            return
        if actions.dtype not in (torch.int64, torch.int32) or actions.ndim != 2 or actions.shape[0] != clips:
            raise ValueError(
                f"actions must be integers of shape ({clips}, frames); got {actions.dtype} {tuple(actions.shape)}"
            )
        given = actions.shape[1]
        if beyond and given <= length:
            raise ValueError(f"actions must go beyond the {length} frames of the context; got {given}")
        if not beyond and given != length:
            raise ValueError(f"each of the {length} frames needs one action; got {given}")
        if not torch.compiler.is_compiling() and ((actions < MASKED) | (actions >= self.actions)).any():
            raise ValueError(
                f"actions go from 0 to {self.actions - 1}, or {MASKED} for unknown; "
                f"got {int(actions.min())} to {int(actions.max())}"
            )
