"""A causal Transformer of 8 blocks on moving digits, in the setting of ConvS5; it generates with a cache."""

from mmengine.config import read_base

from vision_ssm.video import FrameTransformer

with read_base():
    from .._base_.moving_digits import *

model["net"].update(dim=256, stack=dict(type=FrameTransformer, dim=256, width=512, heads=8, layers=8))
