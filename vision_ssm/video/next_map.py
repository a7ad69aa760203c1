"""What follows each map of a clip: layers over time between an encoder and a decoder of single maps, with actions.

Training takes whole clips at once. A rollout feeds each map that is predicted back, and remembers nothing but the state
of the layers.
"""

# Shapes: b clips, t maps in time, h rows, w columns, c channels of the layers. A map is a frame of pixels or of codes;
# "..." stands for its axes.

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import cast

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.layers.convs5 import check_reset, discrete
from vision_ssm.layers.over_time import State

MASKED = -1  # the action, or the code, of what is not known
AT_ONCE = 300  # maps that go through an encoder or decoder at once, where all would not fit; 8 clips of 300 are 8 times

Step = Callable[[Tensor, Tensor | None, State], tuple[Tensor, State]]
"""A map (b, ...), the action (b,) that follows or none, and the state -> a prediction (b, ...) and the next state."""

Choose = Callable[[Tensor], Tensor]
"""Makes of a prediction (b, ...) the map that follows."""


class NextMap(nn.Module, ABC):
    """Predicts what follows each map of a clip.

    Args:
        stack: the layers over time: from inputs (t, b, h', w', c), a state or none, and resets (t, b) or none to
            outputs of the inputs' shape and the last state, a tuple of tensors.
        encoder: from maps (n, ...) to features (n, width, h', w').
        decoder: from outputs (n, c, h', w') to predictions (n, ...).
        width: channels of the features.
        dim: channels c of the layers.
        actions: number of actions; 1 where there are none.
        action_dim: width of an action's embedding.

    Shapes: maps (b, t, ...) -> a prediction of the map that follows each, (b, t, ...), and the last state. ``actions``
    (b, t) are those that lead to the maps that follow, from 0 to ``actions`` - 1, or -1 for unknown; all 0 by default.
    ``state`` goes on from an earlier part of the clip. ``reset`` (b, t) is true where a new clip begins.

    Raises:
        ValueError: sizes that do not fit, maps or actions out of shape, an action out of range, a foreign state.
    """

    def __init__(
        self,
        stack: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        width: int,
        dim: int,
        actions: int = 1,
        action_dim: int = 1,
    ) -> None:
        super().__init__()
        if min(actions, action_dim) < 1:
            raise ValueError(
                f"actions and action_dim must be at least 1; got actions={actions}, action_dim={action_dim}"
            )
        self.actions = actions
        self.encoder = encoder
        self.action = nn.Embedding(actions + 1, action_dim)  # the last row is the unknown action
        self.join = nn.Conv2d(width + action_dim, dim, 1)
        self.stack = stack
        self.decoder = decoder
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep little for the backward pass, and compute the rest a second time: single maps piece by piece, and layers
        over time one by one, if the stack can.
        """
        self.grad_checkpointing = enable
        of_the_stack = getattr(self.stack, "set_grad_checkpointing", None)
        if callable(of_the_stack):
            of_the_stack(enable)

    @abstractmethod
    def check_maps(self, maps: Tensor) -> None:
        """Raises ValueError unless the maps (b, t, ...) fit the model."""

    @abstractmethod
    def choose(self, prediction: Tensor) -> Tensor:
        """The map that follows, (b, ...), by its prediction."""

    def forward(
        self,
        maps: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        self.check(maps, actions)
        check_reset(reset, *maps.shape[:2])
        return self.predict(maps, actions, state, reset)

    def predict(
        self,
        maps: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
        *,
        at: slice | Tensor = slice(None),
    ) -> tuple[Tensor, State]:
        """As ``forward``, of what is known to fit; the predictions after the maps of the places ``at`` alone."""
        clips, length = maps.shape[:2]
        x = self._map_by_map(self.encoder, maps.transpose(0, 1).flatten(0, 1))
        if actions is None:
            embedded = self.action.weight[:1].expand(len(x), -1)
        else:
            embedded = self.action((actions.T.flatten() % (self.actions + 1)).long())  # -1 is the last row
        x = self.join(torch.cat([x, embedded[..., None, None].expand(-1, -1, *x.shape[2:])], dim=1))
        x = x.movedim(1, -1).unflatten(0, (length, clips))
        x, state = self.stack(x, state, None if reset is None else reset.T)
        x = x[at]
        y = self._map_by_map(self.decoder, x.flatten(0, 1).movedim(-1, 1))
        return y.unflatten(0, x.shape[:2]).transpose(0, 1), state

    def _map_by_map(self, module: nn.Module, x: Tensor) -> Tensor:
        """Encoder or decoder of maps (n, ...), each of which is by itself."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            # Nothing in them is random, and no CUDA graph can capture a generator's state.
            return torch.cat([checkpoint(module, piece, preserve_rng_state=False) for piece in x.split(AT_ONCE)])
        return cast(Tensor, module(x))

    def step(self, frame: Tensor, action: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """One map (b, ...) and the action (b,) that follows it -> the prediction of the next, and the next state."""
        y, state = self(frame[:, None], None if action is None else action[:, None], state)
        return y[:, 0], state

    def check(self, maps: Tensor, actions: Tensor | None, *, beyond: bool = False) -> None:
        """Raises ValueError unless the maps fit and each has an action that exists, and maps ``beyond`` them."""
        self.check_maps(maps)
        if actions is None:
            return
        clips, length = maps.shape[:2]
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

    def stream(
        self,
        context: Tensor,
        *,
        actions: Tensor | None = None,
        state: State | None = None,
        choose: Choose | None = None,
    ) -> Iterator[tuple[Tensor, State]]:
        """Generates maps one by one: ``Rollout(self, choose=choose).stream(...)``."""
        return Rollout(self, choose=choose).stream(context, actions=actions, state=state)

    def generate(
        self,
        context: Tensor,
        frames: int,
        *,
        actions: Tensor | None = None,
        state: State | None = None,
        choose: Choose | None = None,
    ) -> tuple[Tensor, State]:
        """The maps after a context, (b, frames, ...): ``Rollout(self, choose=choose).generate(...)``."""
        return Rollout(self, choose=choose).generate(context, frames, actions=actions, state=state)


class Rollout:
    """Generates what follows a context by a model whose weights stand still.

    The recurrences of its layers are discretised once, from the weights as they are now. Make a new rollout after the
    model has learnt more.

    Args:
        model: predicts the next map.
        choose: makes of each prediction the map that follows; the model's way by default.
        accelerate: makes of the step a faster one that computes the same: ``torch.compile``, on a GPU ``CapturedStep``,
            or one of the other. What it compiles or captures serves all that is generated here.
    """

    def __init__(
        self, model: NextMap, *, choose: Choose | None = None, accelerate: Callable[[Step], Step] | None = None
    ) -> None:
        self.model = discrete(model)
        self.choose = choose or model.choose
        self.step: Step = accelerate(self._step) if accelerate else self._step

    def stream(
        self, context: Tensor, *, actions: Tensor | None = None, state: State | None = None
    ) -> Iterator[tuple[Tensor, State]]:
        """Generates maps one by one, without gradients and in constant memory.

        Args:
            context: the maps so far, (b, t, ...), t >= 1; all at once go through the layers.
            actions: the action that leads to each map, those of the context first, (b, t + n); the first is not used.
                Without actions the stream has no end.
            state: the state before the context.

        Yields:
            The next map (b, ...), and the state before it: to go on from there, pass the map as context and this state.

        Raises:
            ValueError: before the first map, where context, actions or state do not fit.
        """
        self.model.check(context, actions, beyond=True)
        return self._roll(context, actions, state)

    def generate(
        self, context: Tensor, frames: int, *, actions: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """The ``frames`` maps after a context, (b, frames, ...), and the state before the last; see ``stream``.

        Raises:
            ValueError: as ``stream``; or no map is asked for, or actions are not one for each map.
        """
        return collect(self.stream(context, actions=actions, state=state), frames, context.shape[1], actions)

    def _step(self, frame: Tensor, action: Tensor | None, state: State) -> tuple[Tensor, State]:
        prediction, state = self.model.predict(frame[:, None], None if action is None else action[:, None], state)
        return prediction[:, 0], state

    @torch.no_grad()
    def _roll(self, context: Tensor, actions: Tensor | None, state: State | None) -> Iterator[tuple[Tensor, State]]:
        ahead = context.shape[1] + 1
        known = None if actions is None else actions[:, 1:ahead]
        predictions, state = self.model.predict(context, known, state, at=slice(-1, None))
        prediction = predictions[:, 0]
        while True:
            frame = self.choose(prediction)
            yield frame, state
            if actions is not None and ahead == actions.shape[1]:
                return
            prediction, state = self.step(frame, None if actions is None else actions[:, ahead], state)
            ahead += 1


def collect(
    stream: Iterator[tuple[Tensor, State]], frames: int, context: int, actions: Tensor | None
) -> tuple[Tensor, State]:
    """The first ``frames`` maps of a stream, (b, frames, ...), and the state that came with the last.

    Raises:
        ValueError: no map is asked for; or actions are not one for each, those of the ``context`` maps before included.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1; got {frames}")
    if actions is not None and actions.shape[1] != context + frames:
        raise ValueError(
            f"actions must be one for each of {context + frames} frames, context included; got {actions.shape[1]}"
        )
    first, state = next(stream)
    found = first.new_empty(first.shape[0], frames, *first.shape[1:])
    found[:, 0] = first
    for i, (frame, after) in enumerate(islice(stream, frames - 1), start=1):
        found[:, i], state = frame, after
    return found, state
