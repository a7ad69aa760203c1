"""Writes video files: all of one or nothing."""
# Shapes: t frames, k channels, h w a frame.

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision_ssm.engine.checkpoint import write_atomically

__all__ = ["write_video"]


class Encoding(NamedTuple):
    """How a kind of file holds frames: its codec, that codec's options, and its pixels for grey and for colour."""

    codec: str
    options: dict[str, str]
    grey: str
    colour: str
    multiple: int = 1  # of which height and width must be
    fastest: int = 1000  # frames per second


SLOWEST = 0.01  # frames per second
ENCODINGS = {
    ".mp4": Encoding("h264", {"crf": "14"}, "yuv420p", "yuv420p", multiple=2),
    ".mkv": Encoding("ffv1", {}, "gray", "bgr0"),  # lossless
    ".gif": Encoding("gif", {}, "gray", "rgb8", fastest=50),  # browsers slow down what is faster
}


def write_video(path: Path, frames: Iterable[Tensor], fps: float) -> None:
    """Writes frames as .mp4 (H.264), .gif or .mkv (FFV1, without loss), by the suffix of ``path``.

    H.264 needs even sizes: a last row or column is repeated where there is an odd one.

    Args:
        path: of the file; its folder exists.
        frames: (t, k, h, w) with values in [-1, 1], grey (k = 1) or RGB (k = 3); or its frames one by one, so that a
            clip of any length is written in constant memory. Values beyond are clipped.
        fps: frames per second.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: another suffix, a rate that the file cannot hold, no frames, frames of different or other shapes,
            NaN or infinite values. No file is written then, and one that was there stays as it was.
    """
    if (suffix := path.suffix.lower()) not in ENCODINGS:
        raise ValueError(
            f"cannot write {path}: {suffix or 'no suffix'} is no kind of video known here; choose "
            f"{', '.join(ENCODINGS)}"
        )
    encoding = ENCODINGS[suffix]
    if not SLOWEST <= fps <= encoding.fastest:
        raise ValueError(f"{suffix} takes {SLOWEST} to {encoding.fastest} frames per second; got {fps}")
    pending = iter(frames)
    if (first := next(pending, None)) is None:
        raise ValueError(f"there are no frames to write to {path}")
    if first.ndim != 3 or first.shape[0] not in (1, 3) or 0 in first.shape:
        raise ValueError(f"a frame is (k, height, width) of 1 or 3 channels and not empty; got {tuple(first.shape)}")
    write_atomically(path, lambda partial: encode(partial, encoding, chain([first], pending), first.shape, fps))


def encode(path: Path, encoding: Encoding, frames: Iterable[Tensor], shape: torch.Size, fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV; pip install 'vision-ssm[video]'") from error
    channels, *size = shape
    odd = [(0, -side % encoding.multiple) for side in size]
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(encoding.codec, Fraction(fps).limit_denominator(1000), encoding.options)
        stream.height, stream.width = (side + more for side, (_, more) in zip(size, odd, strict=True))
        stream.pix_fmt = encoding.grey if channels == 1 else encoding.colour
        for number, frame in enumerate(frames):
            pixels = np.pad(to_bytes(frame, shape, number), (*odd, (0, 0)), mode="edge")
            grey = channels == 1
            picture = av.VideoFrame.from_ndarray(pixels[..., 0] if grey else pixels, format="gray" if grey else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def to_bytes(frame: Tensor, shape: torch.Size, number: int) -> np.ndarray:
    """A frame (k, h, w) in [-1, 1] as (h, w, k) in 0 to 255."""
    if frame.shape != shape:
        raise ValueError(f"frames differ in shape: the first is {tuple(shape)}, number {number} {tuple(frame.shape)}")
    frame = frame.detach().float().cpu()
    if bad := int((~frame.isfinite()).sum()):
        raise ValueError(f"frame {number} holds {bad} NaN or infinite values of {frame.numel()}")
    grey = frame.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(grey.permute(1, 2, 0).numpy())
