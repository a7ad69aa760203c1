"""Generation: each map that is predicted is fed back, in constant memory."""

# Shapes: b clips, t maps in time; "..." stands for the axes of a map.

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from vision_ssm.layers.convs5 import State, discrete
from vision_ssm.video.next_map import NextMap

Step = Callable[[Tensor, Tensor | None, State], tuple[Tensor, State]]
"""A map (b, ...), the action (b,) that follows or none, and the state -> a prediction (b, ...) and the next state."""

Choose = Callable[[Tensor], Tensor]
"""Makes of a prediction (b, ...) the map that follows."""


def _as_predicted(prediction: Tensor) -> Tensor:
    return prediction


class Rollout:
    """Generates what follows a context by a model whose weights stand still.

    The recurrences of its layers are discretised once, from the weights as they are now. Make a new rollout after the
    model has learnt more.

    Args:
        model: predicts the next map.
        choose: makes of each prediction the map that follows, such as a :class:`~vision_ssm.video.Sampler`; by default
            the prediction is the map.
        accelerate: makes of the step a faster one that computes the same: ``torch.compile``, on a GPU ``CapturedStep``,
            or one of the other. What it compiles or captures serves all that is generated here.
    """

    def __init__(
        self, model: NextMap, *, choose: Choose = _as_predicted, accelerate: Callable[[Step], Step] | None = None
    ) -> None:
        self.model = discrete(model)
        self.choose = choose
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
        if frames < 1:
            raise ValueError(f"frames must be at least 1; got {frames}")
        stream = self.stream(context, actions=actions, state=state)
        total = context.shape[1] + frames
        if actions is not None and actions.shape[1] != total:
            raise ValueError(
                f"actions must be one for each of {total} frames, context included; got {actions.shape[1]}"
            )
        return collect(stream, frames)

    def _step(self, frame: Tensor, action: Tensor | None, state: State) -> tuple[Tensor, State]:
        prediction, state = self.model.predict(frame[:, None], None if action is None else action[:, None], state)
        return prediction[:, 0], state

    @torch.no_grad()
    def _roll(self, context: Tensor, actions: Tensor | None, state: State | None) -> Iterator[tuple[Tensor, State]]:
        ahead = context.shape[1] + 1
        known = None if actions is None else actions[:, 1:ahead]
        predictions, state = self.model.predict(context, known, state, last=True)
        prediction = predictions[:, 0]
        while True:
            frame = self.choose(prediction)
            yield frame, state
            if actions is not None and ahead == actions.shape[1]:
                return
            prediction, state = self.step(frame, None if actions is None else actions[:, ahead], state)
            ahead += 1


def collect(stream: Iterator[tuple[Tensor, State]], frames: int) -> tuple[Tensor, State]:
    """The first ``frames`` >= 1 maps of a stream, (b, frames, ...), and the state that came with the last."""
    first, state = next(stream)
    found = first.new_empty(first.shape[0], frames, *first.shape[1:])
    found[:, 0] = first
    for i, (frame, after) in enumerate(islice(stream, frames - 1), start=1):
        found[:, i], state = frame, after
    return found, state


class CapturedStep:
    """A step as one CUDA graph, which leaves the host one launch in place of one for each kernel.

    It is captured at the first call, and replayed at each call; what it returns is not overwritten later. One shape
    goes through it: batch and maps stay as they were at first, and so does the state, which rules out a Transformer.

    Args:
        step: the step; without gradients. A compiled one is compiled before it is captured.

    Raises:
        ValueError: tensors are not on a GPU, or are not those of the first call in shape or dtype.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, frame: Tensor, action: Tensor | None, state: State) -> tuple[Tensor, State]:
        given = [frame, *state] if action is None else [frame, *state, action]
        if not all(m.is_cuda for m in given):
            raise ValueError("a CUDA graph needs all tensors on a GPU; move model and clip there, or use torch.compile")
        if self.graph is None:
            self._capture(given, len(state))
        wanted, got = ([(tuple(m.shape), m.dtype) for m in held] for held in (self.inputs, given))
        if wanted != got:
            raise ValueError(f"captured for tensors {wanted}; got {got}. Capture another step for them")
        torch._foreach_copy_(self.inputs, given)
        self.graph.replay()
        prediction, *after = kept = [torch.empty_like(m) for m in self.outputs]
        torch._foreach_copy_(kept, self.outputs)
        return prediction, tuple(after)

    def _capture(self, given: list[Tensor], states: int) -> None:
        self.inputs = [m.clone() for m in given]
        frame, state, rest = self.inputs[0], tuple(self.inputs[1 : states + 1]), self.inputs[states + 1 :]
        action = rest[0] if rest else None
        device = frame.device
        # Weights that autocast has cast and keeps are freed when it ends, but the graph would go on reading them.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(device), autocast:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # kernels are compiled and chosen before the capture
                    self.step(frame, action, state)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                prediction, after = self.step(frame, action, state)
        self.graph, self.outputs = graph, [prediction, *after]
