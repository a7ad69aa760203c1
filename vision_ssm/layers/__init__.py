"""Modules that two or more models share."""

from .hydra import Hydra
from .mixers import MIXERS, find_mixer
from .scan import RoutedScan, pad_grid
from .ss import SS, SS2D, SS3D

__all__ = ["MIXERS", "SS", "SS2D", "SS3D", "Hydra", "RoutedScan", "find_mixer", "pad_grid"]
