"""Clips of all videos of a folder."""
# Shapes: t frames, k channels, h w a frame.

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from vision_ssm.data.layouts import listing, require_folder
from vision_ssm.data.video_files import index_video, read_clip, require_pixels

__all__ = ["VideoFolder", "video_paths"]

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
MANY = 50  # files that it takes long to read

T = TypeVar("T")


class VideoFolder(Dataset[dict[str, Tensor]]):
    """Clips of the videos of a folder, in the order of their names and, within a video, of time.

    A split is a folder or a list: ``part="train"`` means all videos in ``root/train`` and the folders in it, or those
    that ``root/train.txt`` names, one a line, relative to ``root``. Each file is read through once to count its frames,
    and decoded when a clip is asked for.

    Args:
        root: the folder.
        frames: length t of a clip.
        size: height and width of the frames, which are resized to cover it and cropped about their centre.
        part: the split; all videos in ``root`` by default.
        channels: 3 for RGB, 1 for grey.
        stride: every stride-th frame is taken.
        every: frames from the beginning of a clip to that of the next; by default clips lie side by side.
        classes: names of the folders in which videos lie, where that is what they show.

    Items: ``video`` (t, k, h, w) float32 in [-1, 1]; with ``classes``, ``label`` () int64.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: the folder, the split or a file of its list is missing, or there is no video.
        ValueError: a number is out of range; a folder is no class; a video is unreadable, truncated or damaged, has
            frames of different sizes, or is shorter than a clip.
    """

    def __init__(
        self,
        root: str,
        *,
        frames: int,
        size: tuple[int, int],
        part: str = "",
        channels: int = 3,
        stride: int = 1,
        every: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        covered = (frames - 1) * stride + 1
        step = covered if every is None else every
        if min(frames, stride, step, *size) < 1:
            raise ValueError(
                "frames, stride, every, height and width must be at least 1; "
                f"got frames={frames}, stride={stride}, every={every}, size={tuple(size)}"
            )
        require_pixels(channels)
        paths = video_paths(root, part)
        self.labels = None if classes is None else [label_of(path, classes) for path in paths]
        self.videos = [index_video(path) for path in tracked(paths, "counting frames")]
        if short := [f"{video.path} ({len(video)})" for video in self.videos if len(video) < covered]:
            raise ValueError(
                f"a clip of {frames} frames with stride {stride} covers {covered}, and {len(short)} of {len(paths)} "
                f"videos are shorter: {', '.join(short[:5])}. Take fewer frames, or leave these out of a list of files"
            )
        self.clips = [
            (number, range(start, start + covered, stride))
            for number, video in enumerate(self.videos)
            for start in range(0, len(video) - covered + 1, step)
        ]
        self.size, self.channels = (size[0], size[1]), channels

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, positions = self.clips[index]
        item = {"video": read_clip(self.videos[number], positions, channels=self.channels, size=self.size)}
        if self.labels is not None:
            item["label"] = torch.tensor(self.labels[number])
        return item


def video_paths(root: str, part: str = "") -> list[Path]:
    """The videos of a folder or of one of its splits, in the order of their names; see ``VideoFolder``.

    Raises:
        FileNotFoundError: see there.
        ValueError: a split is both a folder and a list.
    """
    folder = require_folder(root)
    inner, listed = folder / part, folder / f"{part}.txt"
    if part and inner.is_dir() and listed.is_file():
        raise ValueError(f"{inner} is a folder and {listed} a list; keep one of them")
    if inner.is_dir():
        paths = sorted(path for path in inner.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise FileNotFoundError(f"{inner} has no video ({' '.join(SUFFIXES)}); it has {listing(inner)}")
        return paths
    if not listed.is_file():
        raise FileNotFoundError(f"{folder} has neither a folder {part} nor a list {part}.txt; it has {listing(folder)}")
    lines = map(str.strip, listed.read_text(encoding="utf-8").splitlines())
    paths = sorted(folder / line for line in lines if line)
    if not paths:
        raise FileNotFoundError(f"{listed} is empty; write the path of a video, relative to {folder}, in each line")
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{listed} names {len(absent)} files that are not there: {', '.join(absent[:5])}")
    return paths


def label_of(path: Path, classes: Sequence[str]) -> int:
    if path.parent.name not in classes:
        raise ValueError(f"{path} lies in a folder of no class; classes are {', '.join(classes)}")
    return list(classes).index(path.parent.name)


def tracked(items: Sequence[T], task: str) -> Iterator[T]:
    """The items; where they are many, with a bar on the terminal that shows how far the task is done."""
    console = Console(stderr=True)
    hidden = len(items) < MANY or not console.is_terminal
    yield from track(items, task, console=console, transient=True, disable=hidden)
