"""Frames of a video file, counted and read with PyAV.

PyAV's wheels carry FFmpeg, so pip alone installs them wherever torch runs; torchcodec asks for an FFmpeg of the system.
"""
# Shapes: t frames, k channels, h w a frame.

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PIXELS", "Video", "index_video", "read_clip", "read_video"]

PIXELS = {1: "gray", 3: "rgb24"}  # PyAV's names, by the number of channels
COMPLETE = 0.95  # the part of the duration a file states that its frames cover, at least


@dataclass(frozen=True)
class Video:
    """A file whose frames are counted.

    Attributes:
        path: of the file.
        times: of the frames in display order, in the stream's own unit, (t,) int64; all -1 in a file that lacks them.
        keys: numbers, rising, of the frames at which decoding can begin; none without times.
    """

    path: Path
    times: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.times)


def index_video(path: Path) -> Video:
    """Counts the frames of a file without decoding them.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no video, or is truncated or damaged so that this shows without decoding it.
    """
    with opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not packets:
            raise damaged(path, "it has no frames")
        if incomplete := sum(packet.is_corrupt for packet in packets):
            raise damaged(path, f"{incomplete} of {len(packets)} frames are incomplete")
        if container.format.name == "gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
            raise damaged(path, "its end is missing")  # FFmpeg would fill the last frame with the one before
        if any(packet.pts is None for packet in packets):
            return Video(path, np.full(len(packets), -1), np.empty(0, np.int64))
        times = np.array([packet.pts for packet in packets])
        covered = float((times.max() - times.min() + (packets[-1].duration or 0)) * stream.time_base)
        if covered < COMPLETE * (stated := stated_duration(container, stream)):
            raise damaged(path, f"its frames cover {covered:.2f} of {stated:.2f} s")
        order = np.argsort(times, kind="stable")
        return Video(path, times[order], np.flatnonzero(np.array([packet.is_keyframe for packet in packets])[order]))


def read_video(path: Path, *, channels: int, frames: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """The first frames of a file, (t, k, h, w) in [-1, 1].

    Args:
        path: of the file.
        channels: 3 for RGB, 1 for grey.
        frames: number t of frames; all by default.
        size: height and width to which frames are resized and cropped, see ``read_clip``; as they are by default.

    Raises:
        ImportError, FileNotFoundError, ValueError: as ``index_video`` and ``read_clip``; or the file has fewer frames.
    """
    video = index_video(path)
    wanted = len(video) if frames is None else frames
    if not 0 < wanted <= len(video):
        raise ValueError(f"{path} has {len(video)} frames; {wanted} were asked for")
    return read_clip(video, range(wanted), channels=channels, size=size)


def read_clip(video: Video, positions: range, *, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Frames of a video by their numbers, (t, k, h, w) in [-1, 1].

    Args:
        video: from ``index_video``.
        positions: numbers of the frames, rising.
        channels: 3 for RGB, 1 for grey; what the file holds is converted.
        size: frames are resized, keeping their proportions, so that they just cover this height and width, and cropped
            about their centre; by default they stay as they are.

    Raises:
        ValueError: another number of channels; the file is truncated or damaged; its frames differ in size.
    """
    require_pixels(channels)
    # Decoding begins at the last key frame before the clip or, where the times a file states mislead, at the first.
    before = video.keys[video.keys <= positions[0]][-1:] if positions[0] else ()
    for key in (*map(int, before), None):
        pictures = [fitted(frame, PIXELS[channels], size) for frame in decoded(video, positions, key)]
        if len(pictures) == len(positions):
            break
    else:
        raise damaged(video.path, f"its frame {positions[len(pictures)]} of {len(video)} cannot be decoded")
    pixels = torch.from_numpy(np.stack(pictures)).reshape(len(positions), *pictures[0].shape[:2], channels)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def decoded(video: Video, positions: range, key: int | None) -> Iterator[Any]:
    """The frames at ``positions``, decoded from frame number ``key``; without one, from the first, by counting.

    From a key frame on, every frame must have the time that is known of it; the frames end at the first that has not.
    """
    with opened(video.path) as (container, stream):
        if key is not None:
            container.seek(int(video.times[key]), stream=stream)
        number, shape = key or 0, None
        for frame in container.decode(stream):
            if key is not None and frame.pts != video.times[number]:
                if number == key and frame.pts is not None and frame.pts < video.times[key]:
                    continue
                return
            if shape not in (None, (frame.height, frame.width)):
                raise ValueError(
                    f"{video.path} has frames of different sizes: {shape} and, from frame {number}, "
                    f"{(frame.height, frame.width)}; cut it there"
                )
            shape = frame.height, frame.width
            if number in positions:
                yield frame
            number += 1
            if number > positions[-1]:
                return


def fitted(frame: Any, pixels: str, size: tuple[int, int] | None) -> np.ndarray:
    """A frame (h, w) or (h, w, 3), uint8, resized and cropped to ``size``."""
    height, width = size or (frame.height, frame.width)
    scale = max(height / frame.height, width / frame.width)
    tall, wide = round(frame.height * scale), round(frame.width * scale)
    picture: np.ndarray = frame.reformat(wide, tall, pixels).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return picture[top : top + height, left : left + width]


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file's container and its first stream of video; errors of FFmpeg become a ValueError that names the file."""
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV; pip install 'vision-ssm[video]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no such video: {path}")
    try:
        with av.open(path, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video; give a file of frames, such as .mp4")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:  # PyAV knows no name for some of FFmpeg's errors
        raise damaged(path, error.strerror) from error


def stated_duration(container: Any, stream: Any) -> float:
    """Seconds that a file says its video takes; 0 if it says nothing, or speaks of video and sound together."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def damaged(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path} is no video, or is truncated or damaged ({reason}); copy it again, or convert it")


def require_pixels(channels: int) -> None:
    if channels not in PIXELS:
        raise ValueError(f"videos are read as grey or RGB, of 1 or 3 channels; got {channels}")
