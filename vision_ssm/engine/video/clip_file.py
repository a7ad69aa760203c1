"""Clips in files, videos and arrays, of which only some frames are in memory."""
# Shapes: t frames, k channels, h w a frame.

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from vision_ssm.data.video_files import index_video, read_clip
from vision_ssm.engine.config import config_name

__all__ = ["Clip", "open_clip", "read_array"]


@dataclass(frozen=True)
class Clip:
    """A clip in a file, of which only some frames are in memory.

    Attributes:
        length: how many frames it has.
        read: some of them by their numbers, (t, k, h, w) in [-1, 1].
    """

    length: int
    read: Callable[[range], Tensor]


def open_clip(path: Path, config: Config, channels: int) -> Clip:
    """The clip in a file.

    Args:
        path: of a video, whose frames are resized and cropped to the config's ``frame_size``; or of an array (.npy) of
            bytes, or of numbers in [-1, 1]: (t, h, w), or (t, k, h, w).
        channels: of the frames of a video, grey or RGB; those of an array stay as they are.

    Raises:
        FileNotFoundError, ValueError: the file is missing, unreadable or truncated, or no clip. Of frames that are read
            later, too: they are damaged, differ in size, or hold values beyond.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one clip at a time, a video or an array (.npy)")
    if path.suffix != ".npy":
        video = index_video(path)
        size = frame_size(config)
        return Clip(len(video), lambda numbers: read_clip(video, numbers, channels=channels, size=size))
    pixels = read_array(path)
    if pixels.ndim not in (3, 4) or 0 in pixels.shape or (pixels.dtype != np.uint8 and pixels.dtype.kind != "f"):
        raise ValueError(
            f"{path} must hold frames (t, h, w) or (t, k, h, w), as bytes or as numbers in [-1, 1]; "
            f"it has {pixels.dtype} {pixels.shape}"
        )

    def read(numbers: range) -> Tensor:
        part = np.array(pixels[numbers.start : numbers.stop])
        if part.dtype == np.uint8:
            part = part / np.float32(127.5) - 1
        if not (np.abs(part) <= 1).all():  # NaN is not
            raise ValueError(f"{path} must have values in [-1, 1], or bytes; scale them")
        frames = torch.from_numpy(part.astype(np.float32))
        return frames[:, None] if frames.ndim == 3 else frames

    return Clip(len(pixels), read)


def frame_size(config: Config) -> tuple[int, int]:
    """Height and width of the frames that a config takes of a video."""
    size = config.get("frame_size")
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(type(side) is int and side > 0 for side in size)
    ):
        raise ValueError(
            f"config {config_name(config)} must state frame_size, the height and width to which videos are resized and "
            f"cropped, such as (64, 64); it has {size!r}"
        )
    return size[0], size[1]


def read_array(path: Path) -> np.ndarray:
    """The array of a file, which stays on the disk."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} is truncated or no array ({error}); write it with numpy.save") from error
