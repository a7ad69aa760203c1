"""Models of video in a benchmark: training steps on whole clips, and generation frame by frame."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.layers import ConvS5Layer
from vision_ssm.video import MODELS, CapturedStep, ConvLSTM, NextFrame, Rollout, pixel_loss
from vision_ssm.video.next_map import Step
from vision_ssm.video.transformer import AttentionBlock

from .jobs import BOTH, captured, torch_name
from .rows import Clip, Timing
from .timing import measure

__all__ = ["GENERATION", "NEXT_FRAME", "RUNS", "GenerationJob", "TrainingJob"]

NEXT_FRAME, GENERATION = "next frame", "generation"


@dataclass(frozen=True)
class Run:
    """How a model runs, be it a training step or the next frame.

    Args:
        compiled: by torch.compile.
        captured: as a CUDA graph.
    """

    compiled: bool = False
    captured: bool = False

    def accelerate(self, step: Step) -> Step:
        """The step that generates a frame, run in this way."""
        if self.compiled:
            step = torch.compile(step)
        return CapturedStep(step) if self.captured else step


RUNS = {
    "eager": Run(),
    "compiled": Run(compiled=True),
    "CUDA graph": Run(captured=True),
    "compiled, CUDA graph": Run(compiled=True, captured=True),
}


@dataclass(frozen=True)
class VideoJob:
    """What the jobs of a model have in common.

    Args:
        model: name in ``MODELS``.
        run: how it runs, a name in ``RUNS``; compiling and capturing are not part of the time.
        batch: clips of one run.
        size: side of the frames in pixels.
        autocast: the dtype of autocast, if any.
    """

    model: str
    run: str = "eager"
    batch: int = 1
    size: int = 64
    autocast: torch.dtype | None = torch.bfloat16

    def build(self, device: torch.device) -> NextFrame:
        """The model with fresh weights, those of convolutions channels-last."""
        torch.compiler.reset()  # sizes are compiled one by one, not as one program for any size
        with device:
            model = MODELS[self.model]()
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)
        return model

    def clip(self, frames: int, device: torch.device) -> Tensor:
        return torch.rand(self.batch, frames, 1, self.size, self.size, device=device) * 2 - 1

    def casting(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def measured(self, work: Callable[[], object], device: torch.device, seconds: float) -> Timing:
        """The memory of a CUDA graph is its own and is not counted."""
        timing = measure({"": work}, device, seconds)[""]
        return replace(timing, peak_mib=None) if RUNS[self.run].captured else timing

    def fields(self, case: str, direction: str, timing: Timing | None, clip: Clip, note: str = "") -> dict[str, Any]:
        """Fields of a row, all but the suite and the environment."""
        return {
            "subject": self.model,
            "case": ", ".join([case, *([] if self.run == "eager" else [self.run])]),
            "batch": self.batch,
            "direction": direction,
            "dtype": torch_name(self.autocast or torch.float32),
            "layout": torch_name(torch.channels_last),
            "timing": timing,
            "accuracy": None,
            "clip": clip,
            "note": note,
        }


@dataclass(frozen=True)
class TrainingJob(VideoJob):
    """Forward and backward on whole clips of ``frames`` frames and the one after, without an optimizer.

    Args:
        checkpointing: of what little is kept for the backward: of "maps", encoder and decoder, or of "all", the layers
            over time too; of nothing by default.
    """

    frames: int = 300
    checkpointing: Literal["maps", "all"] | None = None

    @property
    def label(self) -> str:
        return f"train {self.model}: {self.frames} frames, {self.run}"

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of the row."""
        note = f"{self.checkpointing} checkpointed" if self.checkpointing else ""
        timing: Timing | None
        try:
            timing = self.time(device, seconds)
        except torch.OutOfMemoryError as error:
            timing, note = None, f"{note}, {refusal(error)}".removeprefix(", ")
        yield self.fields(f"{self.frames} frames", BOTH, timing, Clip(frames=self.frames, state_bytes=None), note)

    def time(self, device: torch.device, seconds: float) -> Timing:
        model = self.build(device).train()
        if self.checkpointing:
            model.set_grad_checkpointing()
            stack: Any = model.stack
            stack.set_grad_checkpointing(self.checkpointing == "all")
        if RUNS[self.run].compiled:
            compile_parts(model)
        work: Callable[[], object] = partial(self.step, model, self.clip(self.frames + 1, device))
        if RUNS[self.run].captured:
            work = captured(work)
        return self.measured(work, device, seconds)

    def step(self, model: NextFrame, clip: Tensor) -> None:
        model.zero_grad()
        with self.casting(clip.device):
            prediction, _ = model(clip[:, :-1])
        pixel_loss(prediction.float(), clip[:, 1:]).backward()


@dataclass(frozen=True)
class GenerationJob(VideoJob):
    """The next frame after so many, and all ``frames`` after the first context.

    Args:
        contexts: numbers of frames after which the time of the next one and the state are measured, in rising order.
        frames: how many are generated one after the other after the first context.
        summed: sum the time of all ``frames`` from that of the next one after each context, on straight lines between
            them, in place of generating them: for models whose time per frame grows.
    """

    contexts: tuple[int, ...] = (10, 100, 1000)
    frames: int = 1000
    summed: bool = False

    @property
    def label(self) -> str:
        return f"generate {self.model}: {self.run}"

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of a row for each context, and of one for all frames."""
        model = self.build(device).eval()
        rollout = Rollout(model, accelerate=RUNS[self.run].accelerate)
        timings: dict[int, Timing] = {}
        size, direction = None, NEXT_FRAME
        try:
            for context in self.contexts:
                case = f"after {context:,} frames"
                if self.summed:  # the state has another shape
                    torch.compiler.reset()
                    rollout = Rollout(model, accelerate=RUNS[self.run].accelerate)
                timings[context], size = self.next_frame(rollout, context, device, seconds)
                yield self.fields(case, direction, timings[context], Clip(frames=1, state_bytes=size))
            case, direction = f"{self.frames:,} frames", GENERATION
            if self.summed:
                timing, note = total(timings, self.frames), "summed from the frames above"
            else:
                timing, note = self.generation(rollout, device, seconds), ""
            yield self.fields(case, direction, timing, Clip(frames=self.frames, state_bytes=size), note)
        except torch.OutOfMemoryError as error:
            yield self.fields(case, direction, None, Clip(frames=1, state_bytes=None), refusal(error))

    @torch.no_grad()
    def next_frame(self, rollout: Rollout, context: int, device: torch.device, seconds: float) -> tuple[Timing, int]:
        """The time of one frame after ``context`` frames, and the bytes of the state before it."""
        with self.casting(device):
            frame, state = next(rollout.stream(self.clip(context, device)))
            timing = self.measured(partial(rollout.step, frame, None, state), device, seconds)
        return timing, sum(m.nbytes for m in state)

    def generation(self, rollout: Rollout, device: torch.device, seconds: float) -> Timing:
        """The time of all frames after the first context."""
        context = self.clip(self.contexts[0], device)
        with self.casting(device):
            return self.measured(partial(rollout.generate, context, self.frames), device, seconds)


def compile_parts(model: NextFrame) -> None:
    """Encoder, decoder and each layer by itself, so that layers that are alike are compiled once.

    The loop of ConvLSTM over time would be unrolled, frame by frame; of it, what the gates do is compiled.
    """
    advance = torch.compile(ConvLSTM.advance)
    for part in (model.encoder, model.decoder, *model.stack.modules()):
        if isinstance(part, ConvLSTM):
            part.advance = advance  # type: ignore[method-assign]
        elif part in (model.encoder, model.decoder) or isinstance(part, ConvS5Layer | AttentionBlock):
            part.compile()


def refusal(error: torch.OutOfMemoryError) -> str:
    """What the allocator says first: that there is no memory, and how much it was asked for."""
    return ". ".join(str(error).split(". ")[:2])


def total(timings: dict[int, Timing], frames: int) -> Timing:
    """The time of ``frames`` frames, those between two that were measured on a line, those outside as the nearest."""
    measured = list(timings)

    def over(values: Sequence[float]) -> float:
        return float(np.interp(np.arange(frames), measured, values).sum())

    every = timings.values()
    peaks = [timing.peak_mib for timing in every if timing.peak_mib is not None]
    return Timing(
        median_ms=over([timing.median_ms for timing in every]),
        p20_ms=over([timing.p20_ms for timing in every]),
        p80_ms=over([timing.p80_ms for timing in every]),
        runs=min(timing.runs for timing in every),
        peak_mib=max(peaks, default=None),
        clock_mhz=next(iter(every)).clock_mhz,
    )
