"""ConvS5 of 8 layers and 128 channels on moving digits, trained on clips of 600 frames: the published setting."""

from mmengine.config import read_base

from vision_ssm.video import convs5_stack

with read_base():
    from .._base_.moving_digits import *

model["net"].update(dim=128, stack=dict(type=convs5_stack, dim=128, state=128, layers=8))
train_dataloader["dataset"]["dataset"].update(frames=600)
optim_wrapper["optimizer"].update(lr=5e-4)
