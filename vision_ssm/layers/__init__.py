"""Modules that two or more models share."""

from .ss import MIXERS, SS2D, RoutedScan, find_mixer, pad_grid

__all__ = ["MIXERS", "SS2D", "RoutedScan", "find_mixer", "pad_grid"]
