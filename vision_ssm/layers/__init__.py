"""Modules that two or more models share."""

from .convs5 import ConvS5, ConvS5Layer
from .hydra import Hydra
from .mamba_mixer import MambaMixerBlock
from .mixers import MIXERS, find_mixer
from .over_time import TemporalStack
from .scan import RoutedScan, pad_grid
from .ss import SS, SS2D, SS3D

__all__ = [
    "MIXERS",
    "SS",
    "SS2D",
    "SS3D",
    "ConvS5",
    "ConvS5Layer",
    "Hydra",
    "MambaMixerBlock",
    "RoutedScan",
    "TemporalStack",
    "find_mixer",
    "pad_grid",
]
