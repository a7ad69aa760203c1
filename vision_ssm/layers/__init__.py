"""Modules that two or more models share."""

from .bidirectional import BidirectionalScan
from .hydra import Hydra
from .ss import MIXERS, SS2D, RoutedScan, find_mixer, pad_grid

__all__ = ["MIXERS", "SS2D", "BidirectionalScan", "Hydra", "RoutedScan", "find_mixer", "pad_grid"]
