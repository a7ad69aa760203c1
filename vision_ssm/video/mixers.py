"""Layers over time by name, for models that are given their width by the maps that they stand between."""

import math
from collections.abc import Callable

from torch import nn

from vision_ssm.layers import TemporalStack
from vision_ssm.video.conv_lstm import ConvLSTM
from vision_ssm.video.convs5 import convs5_stack

TemporalMixer = Callable[[int], nn.Module]
"""Makes layers over maps of so many channels: (t, b, h, w, c), states and resets to (t, b, h, w, c) and states."""


def _convs5(dim: int) -> TemporalStack:
    return convs5_stack(dim, state=dim, layers=2, groups=math.gcd(dim, 32))


def _conv_lstm(dim: int) -> TemporalStack:
    return TemporalStack(ConvLSTM(dim) for _ in range(2))


def _identity(dim: int) -> TemporalStack:
    return TemporalStack(())


TEMPORAL_MIXERS: dict[str, TemporalMixer] = {"convs5": _convs5, "conv_lstm": _conv_lstm, "identity": _identity}
"""Two layers each, with as many states at each place as channels; "identity" keeps the frames apart, as a control."""


def temporal_mixer(mixer: str | TemporalMixer, dim: int) -> nn.Module:
    """The layers of a name in ``TEMPORAL_MIXERS``, or those that a function of the width makes.

    Raises:
        ValueError: there is no such name, or the layers do not take this width.
    """
    if isinstance(mixer, str):
        if mixer not in TEMPORAL_MIXERS:
            raise ValueError(
                f"unknown mixer {mixer!r}; mixers are {', '.join(TEMPORAL_MIXERS)}, or a function of the width that "
                "makes layers over time"
            )
        mixer = TEMPORAL_MIXERS[mixer]
    return mixer(dim)
