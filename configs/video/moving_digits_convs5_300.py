"""ConvS5 of 8 layers and 256 channels on moving digits, trained on clips of 300 frames: the published setting."""

from mmengine.config import read_base

from vision_ssm.video import convs5_stack

with read_base():
    from .._base_.moving_digits import *

model["net"].update(dim=256, stack=dict(type=convs5_stack, dim=256, state=256, layers=8))
