"""Moving-MNIST made on the fly: real digits that glide over a black canvas and bounce off its border.

After Srivastava et al., "Unsupervised Learning of Video Representations using LSTMs", ICML 2015, arXiv:1502.04681. A
digit moves 0.15 of its free range per frame in a random direction, as ConvS5's long clips do (arXiv:2310.19694); it is
reflected at the border, and where digits overlap the brighter pixel is seen.
"""
# Shapes: t frames, n digits in a clip, h w the canvas, d the side of a digit.

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

__all__ = ["MovingDigits"]

Label = Literal["heading", "sum"]


class MovingDigits(Dataset[dict[str, Tensor]]):
    """Clips of moving digits, each a function of the seed and its number alone, whoever makes it and in what order.

    Clips are drawn anew at each access and nothing is stored, so ``clips`` may be millions. Train and test clips share
    no digit if their ``digits`` share none, as the two parts of ``mnist5k`` and ``mnist`` do.

    Args:
        digits: items with ``image`` (1, d, d) in [0, 1] and ``label`` (), such as ``mnist5k("train")``.
        clips: number of clips.
        frames: length t of a clip.
        size: height and width of the canvas.
        count: number n of digits in a clip.
        speed: distance per frame, in units of the range in which a digit is free to move, along each axis.
        digit_size: side to which digits are resized; that of ``digits`` by default.
        label: of a clip: ``heading`` is the way its one digit goes at the end, 0 to 3 for up-left, up-right, down-left
            and down-right, which no single frame tells; ``sum`` is the sum of its digits. None by default.
        seed: of all clips.

    Items: ``video`` (t, 1, h, w) float32, -1 the canvas and 1 the brightest stroke; with ``label``, ``label`` () int64.

    Raises:
        ValueError: there are no digits, or they do not fit on the canvas; a number is out of range; an unknown label;
            a heading is asked for of several digits.
        IndexError: a clip's number is not in 0 to ``clips`` - 1.
    """

    def __init__(
        self,
        digits: Iterable[Mapping[str, Tensor]],
        *,
        clips: int,
        frames: int,
        size: tuple[int, int] = (64, 64),
        count: int = 2,
        speed: float = 0.15,
        digit_size: int | None = None,
        label: Label | None = None,
        seed: int = 0,
    ) -> None:
        if min(clips, frames, count) < 1 or speed < 0 or (digit_size is not None and digit_size < 1):
            raise ValueError(
                "clips, frames, count and digit_size must be at least 1, and speed at least 0; "
                f"got clips={clips}, frames={frames}, count={count}, digit_size={digit_size}, speed={speed}"
            )
        if label is not None and label not in LABELS:
            raise ValueError(f"unknown label {label!r}; labels are {', '.join(LABELS)}, and None")
        if label == "heading" and count != 1:
            raise ValueError(f"the heading is that of one digit, and count is {count}; set count=1")
        self.images, self.names = stacked(digits, digit_size)
        if self.images.shape[1] > min(size):
            raise ValueError(
                f"digits of {self.images.shape[1]} pixels do not fit on a canvas of {size[0]} x {size[1]}; "
                "enlarge size or reduce digit_size"
            )
        self.clips, self.frames, self.size, self.count = clips, frames, (size[0], size[1]), count
        self.speed, self.label, self.seed = speed, label, seed

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} does not exist; clips are 0 to {self.clips - 1}")
        random = np.random.default_rng((self.seed, index))
        chosen = random.integers(len(self.images), size=self.count)
        angle = random.uniform(0, 2 * np.pi, self.count)
        velocity = self.speed * np.stack((np.sin(angle), np.cos(angle)), axis=-1)
        along = random.uniform(0, 1, (self.count, 2)) + np.arange(self.frames)[:, None, None] * velocity
        # The canvas of positions, unfolded at its borders: every other copy is mirrored.
        place = 1 - np.abs(1 - along % 2)
        item = {"video": self.render(chosen, place)}
        if self.label is not None:
            goes_on = along[-1] % 2 < 1
            item["label"] = torch.tensor(LABELS[self.label](self.names[chosen], np.where(goes_on, velocity, -velocity)))
        return item

    def render(self, chosen: np.ndarray, place: np.ndarray) -> Tensor:
        """Clip (t, 1, h, w) of the digits ``chosen`` (n,) at ``place`` (t, n, 2), from 0 to 1 down and to the right."""
        side = self.images.shape[1]
        corner = np.rint(place * (self.size[0] - side, self.size[1] - side)).astype(np.int64)
        canvas = np.zeros((self.frames, *self.size), np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(canvas, (side, side), axis=(1, 2), writeable=True)
        time = np.arange(self.frames)
        for digit, (down, right) in zip(chosen, corner.transpose(1, 2, 0), strict=True):
            windows[time, down, right] = np.maximum(windows[time, down, right], self.images[digit])
        return torch.from_numpy(canvas)[:, None].float().div_(127.5).sub_(1)


def stacked(digits: Iterable[Mapping[str, Tensor]], side: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (m, d, d) in 0 to 255 and labels (m,) of m digits, resized to ``side`` if it is given."""
    items = list(digits)
    if not items:
        raise ValueError("there are no digits to move; give for example mnist5k('train')")
    images = torch.stack([item["image"] for item in items])
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"digits must be square and grey, (1, d, d); got {tuple(images.shape[1:])}")
    if side not in (None, images.shape[2]):
        images = interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    grey = images[:, 0].clamp(0, 1).mul(255).round().to(torch.uint8)
    return grey.numpy(), np.array([int(item["label"]) for item in items])


def heading(digits: np.ndarray, velocity: np.ndarray) -> int:
    """Quarter of the velocity (1, 2), down and to the right, of one digit."""
    down, right = (velocity[0] >= 0).tolist()
    return 2 * down + right


def total(digits: np.ndarray, velocity: np.ndarray) -> int:
    return int(digits.sum())


LABELS: dict[Label, Callable[[np.ndarray, np.ndarray], int]] = {"heading": heading, "sum": total}
