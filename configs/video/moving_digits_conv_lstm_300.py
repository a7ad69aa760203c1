"""ConvLSTM of 8 layers and 256 channels on moving digits, in the setting of ConvS5."""

from mmengine.config import read_base

from vision_ssm.video.models import conv_lstm_stack

with read_base():
    from .._base_.moving_digits import *

model["net"].update(dim=256, stack=dict(type=conv_lstm_stack, dim=256, layers=8))
