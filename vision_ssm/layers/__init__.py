"""Modules that two or more models share."""

from .hydra import Hydra
from .mixers import MIXERS, find_mixer
from .scan import RoutedScan, pad_grid
from .ss import SS2D

__all__ = ["MIXERS", "SS2D", "Hydra", "RoutedScan", "find_mixer", "pad_grid"]
