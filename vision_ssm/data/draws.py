"""Random training samples numbered from zero: draw i is the same whenever, and on whichever process, it is made.

A run that was interrupted after n draws therefore continues with draw n, and sees what it would have seen.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
from monai.transforms import Compose
from torch.utils.data import Dataset, Sampler

__all__ = ["DrawSampler", "Draws"]


class Draws(Dataset[Any]):
    """Random variants of a dataset's items; every item is drawn once in each pass, in shuffled order.

    Args:
        dataset: the items, already loaded.
        transforms: random MONAI transforms of one item; none by default.
        seed: of the order and of the transforms.
    """

    def __init__(self, dataset: Any, transforms: Sequence[Callable[..., Any]] = (), seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = Compose(list(transforms))
        self.seed = seed
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Items in one pass; draws beyond it are valid."""
        return len(self.dataset)

    def __getitem__(self, draw: int) -> Any:
        rounds, position = divmod(draw, len(self.dataset))
        seed = np.random.SeedSequence((self.seed, draw)).generate_state(1)[0]
        self.transform.set_random_state(seed=int(seed))
        return self.transform(self.dataset[int(self._order(rounds)[position])])

    def _order(self, rounds: int) -> np.ndarray:
        if self._pass is None or self._pass[0] != rounds:
            self._pass = rounds, np.random.default_rng((self.seed, rounds)).permutation(len(self.dataset))
        return self._pass[1]


class DrawSampler(Sampler[int]):
    """Draw numbers without end: ``start + rank``, then every ``world_size``-th.

    Args:
        dataset: accepted for the data loader's sake; draws have no end.
        rank, world_size: this process among those that train together.
    """

    def __init__(self, dataset: Sized, rank: int = 0, world_size: int = 1) -> None:
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start + self.rank, self.world_size)

    def __len__(self) -> int:
        return len(self.dataset)
