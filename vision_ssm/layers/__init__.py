"""Modules that two or more models share."""

from .bidirectional import BidirectionalScan
from .ss import MIXERS, SS2D, RoutedScan, find_mixer, pad_grid

__all__ = ["MIXERS", "SS2D", "BidirectionalScan", "RoutedScan", "find_mixer", "pad_grid"]
