"""Next-frame prediction in codes: a frozen tokenizer turns frames into codes and back, layers over time predict them.

As in Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", NeurIPS 2023,
arXiv:2310.19694, in the 3-D environments. Their TECO variant, with codes of its own and a prior that refines them, is
not here.
"""

# Shapes: b clips, t frames, k channels of a frame, h rows, w columns; h' and w' of codes; n codes.

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.layers.over_time import State
from vision_ssm.video.next_frame import check_frames, check_widths, frame_decoder, frame_encoder
from vision_ssm.video.next_map import AT_ONCE, MASKED, NextMap, Rollout, collect
from vision_ssm.video.tokenizer import Tokenizer, check_codes

HIDDEN = -2.0  # what the published model sees of a frame that is not shown


def code_loss(logits: Tensor, codes: Tensor, *, label_smoothing: float = 0.01) -> Tensor:
    """Cross-entropy of logits (b, t, n, h', w') and codes (b, t, h', w'), averaged over all codes: ()."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(0, 1), label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Sampler:
    """Draws codes by their logits, each place of the map by itself.

    Args:
        temperature: above 1 evens the odds, below 1 sharpens them; 0 takes the most probable code.
        top_k: draw among so many most probable codes; among all by default.
        generator: where the randomness comes from, on the device of the logits; torch's own by default.

    Shapes: logits (b, n, h', w') -> codes (b, h', w').

    Raises:
        ValueError: temperature or top_k mean nothing, or there are fewer codes than ``top_k``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, and finite; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or none for all codes; got {self.top_k}")

    def __call__(self, logits: Tensor) -> Tensor:
        total = logits.shape[1]
        if self.top_k is not None and self.top_k > total:
            raise ValueError(f"top_k must be at most the {total} codes; got {self.top_k}")
        if self.temperature == 0:
            return logits.argmax(dim=1)
        scores = logits.movedim(1, -1).float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        odds = scores.softmax(dim=-1).flatten(0, -2)
        return torch.multinomial(odds, 1, generator=self.generator).view(scores.shape[:-1])


class CodeEmbedding(nn.Module):
    """A vector for each code, and a constant for codes that are not shown: (n, h', w') -> (n, width, h', w')."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(codes, width)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.table(codes.clamp(min=0))
        return x.masked_fill((codes == MASKED)[..., None], HIDDEN).movedim(-1, 1)


class NextCode(NextMap):
    """Predicts the codes of each next frame: embedding, encoder, layers over time, decoder, logits.

    Args:
        stack: the layers over time, as for :class:`NextMap`.
        codes: how many there are, n.
        dim: channels c of the layers.
        embedding: width of a code's embedding.
        encoder: widths of the encoder; every one after the first halves the map.
        decoder: widths of the decoder, in the encoder's order.
        encoder_units: residual units at each width of the encoder.
        decoder_units: residual units at each width of the decoder.
        actions: number of actions; 1 where there are none.
        action_dim: width of an action's embedding.

    Shapes: codes (b, t, h', w') of frames, from 0 to n - 1, or -1 for those that are not shown -> logits of the codes
    that follow each, (b, t, n, h', w'), and the last state. ``actions`` (b, t), ``state`` and ``reset`` (b, t) as for
    :class:`NextMap`. ``stream`` and ``generate`` give codes, drawn by ``choose``: a :class:`Sampler`, by default one
    that follows the odds.

    Raises:
        ValueError: sizes that do not fit, codes or actions out of shape or range, a foreign state.
    """

    def __init__(
        self,
        stack: nn.Module,
        codes: int,
        *,
        dim: int,
        embedding: int = 256,
        encoder: Sequence[int] = (256,),
        decoder: Sequence[int] = (512,),
        encoder_units: int = 1,
        decoder_units: int = 4,
        actions: int = 1,
        action_dim: int = 1,
    ) -> None:
        check_widths(encoder, decoder)
        if min(codes, embedding, encoder_units, decoder_units) < 1:
            raise ValueError(
                f"codes, embedding and units must be at least 1; got codes={codes}, embedding={embedding}, "
                f"encoder_units={encoder_units}, decoder_units={decoder_units}"
            )
        super().__init__(
            stack,
            nn.Sequential(CodeEmbedding(codes, embedding), *frame_encoder(embedding, encoder, encoder_units)),
            frame_decoder(dim, decoder, decoder_units, codes),
            width=encoder[-1],
            dim=dim,
            actions=actions,
            action_dim=action_dim,
        )
        self.codes, self.stride = codes, 2 ** (len(encoder) - 1)

    def check_maps(self, maps: Tensor) -> None:
        check_codes(maps, self.codes, least=MASKED)
        size = tuple(maps.shape[2:])
        if any(cells % self.stride for cells in size):
            raise ValueError(f"height and width of the codes must be multiples of {self.stride}; got {size}")

    def choose(self, prediction: Tensor) -> Tensor:
        return Sampler()(prediction)


class CodedVideo(nn.Module):
    """A frozen tokenizer and a model over its codes: frames in, frames out.

    The tokenizer has no gradients and stays in evaluation mode, whatever the mode of the model.

    Args:
        tokenizer: turns frames into codes and back.
        model: predicts codes; the part that is trained.

    Shapes: frames (b, t, k, h, w) with values in [-1, 1] -> logits of the codes that follow each, (b, t, n, h', w'),
    and the last state; see :class:`NextCode`.

    Raises:
        ValueError: the model has another number of codes than the tokenizer, frames do not fit, or as the model.
    """

    def __init__(self, tokenizer: Tokenizer, model: NextCode) -> None:
        super().__init__()
        if tokenizer.codes != model.codes:
            raise ValueError(f"the model must have the {tokenizer.codes} codes of its tokenizer; got {model.codes}")
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.model = model
        self.channels, self.stride = tokenizer.channels, tokenizer.stride * model.stride

    def train(self, mode: bool = True) -> "CodedVideo":
        super().train(mode)
        self.tokenizer.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the model; see :class:`NextMap`. The tokenizer has nothing to keep."""
        self.model.set_grad_checkpointing(enable)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Codes (b, t, h', w') of frames (b, t, k, h, w), in parts: activations of whole clips would not fit."""
        check_frames(frames, self.channels, self.stride)
        parts = frames.split(max(1, AT_ONCE // len(frames)), dim=1)
        return torch.cat([self.tokenizer.encode(part) for part in parts], dim=1)

    def forward(
        self,
        frames: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        return self.model(self.encode(frames), actions, state, reset)

    def stream(
        self,
        context: Tensor | None = None,
        *,
        actions: Tensor | None = None,
        state: State | None = None,
        rollout: Rollout | None = None,
    ) -> Iterator[tuple[Tensor, State]]:
        """Generates frames one by one, without gradients and in constant memory.

        Args:
            context: frames (b, t, k, h, w) that came, those of ``state`` before them; none to go on from the state.
            actions: the action that leads to each frame, those of the context first, (b, t + n). Without a state, the
                first is not used. Without actions the stream has no end.
            state: of an earlier stream, up to the frame that it came with.
            rollout: of the model, with its sampler and, if wanted, an accelerated step; a plain one by default.

        Yields:
            The next frame (b, k, h, w) and the state up to it: its codes, then the states of the layers before it.

        Raises:
            ValueError: before the first frame, where frames, actions or state do not fit, or there are neither frames
                nor a state.
        """
        if context is None and not state:
            raise ValueError("give frames to begin with as context, or the state of an earlier stream")
        known = [] if context is None else [self.encode(context)]
        before = None
        if state:
            pending, *layers = state
            if pending.dtype != torch.int64 or pending.ndim != 3 or (known and known[0][:, 0].shape != pending.shape):
                raise ValueError(
                    "the state must begin with the codes of a frame, int64 of shape (clips, height, width) as the "
                    f"context's; got {pending.dtype} {tuple(pending.shape)}. Is it another model's?"
                )
            known, before = [pending[:, None], *known], tuple(layers)
            if actions is not None and actions.ndim == 2:
                actions = F.pad(actions, (1, 0))  # the action that leads to the first of all maps is not used
        codes = torch.cat(known, dim=1)
        return self._decoded((rollout or Rollout(self.model)).stream(codes, actions=actions, state=before))

    def generate(
        self,
        context: Tensor | None,
        frames: int,
        *,
        actions: Tensor | None = None,
        state: State | None = None,
        rollout: Rollout | None = None,
    ) -> tuple[Tensor, State]:
        """The next ``frames`` frames, (b, frames, k, h, w), and the state up to the last; see ``stream``.

        Raises:
            ValueError: as ``stream``; or no frame is asked for, or actions are not one for each frame.
        """
        stream = self.stream(context, actions=actions, state=state, rollout=rollout)
        return collect(stream, frames, 0 if context is None else context.shape[1], actions)

    @torch.no_grad()
    def _decoded(self, stream: Iterator[tuple[Tensor, State]]) -> Iterator[tuple[Tensor, State]]:
        for codes, state in stream:
            yield self.tokenizer.decode(codes[:, None])[:, 0], (codes, *state)
