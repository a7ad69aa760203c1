"""Which way a digit goes: vmamba_nano's maps of the frames, and ConvS5 over time; for a CPU, minutes of training.

No single frame shows it: ``--set model.net.mixer=identity``, which judges the last frame by itself, guesses one of
four.
"""

from mmengine.config import read_base
from mmengine.optim import OneCycleLR, OptimWrapper
from torch.optim import AdamW

from vision_ssm.data.draws import Draws
from vision_ssm.data.images import mnist5k
from vision_ssm.data.moving_digits import MovingDigits
from vision_ssm.engine.metrics import Accuracy
from vision_ssm.engine.video.clips import ClipClassification
from vision_ssm.video import ClipClassifier

with read_base():
    from .._base_.runtime import *

score = "accuracy/top1"  # shown while training
classes = ("up-left", "up-right", "down-left", "down-right")
frame_size = (32, 32)  # to which a video is resized and cropped to say what it shows

model = dict(
    type=ClipClassification,
    net=dict(
        type=ClipClassifier,
        backbone="vmamba_nano",
        in_channels=1,
        classes=len(classes),
        dim=32,
        mixer="convs5",
        out_index=1,  # at 1/8: coarser maps do not show a digit move
    ),
)

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        type=Draws,
        dataset=dict(
            type=MovingDigits,
            digits=dict(type=mnist5k, split="train"),
            clips=1_000_000,
            frames=6,
            size=frame_size,
            count=1,
            digit_size=14,
            label="heading",
        ),
    ),
)
val_dataloader = dict(
    batch_size=32,
    dataset=dict(
        type=MovingDigits,
        digits=dict(type=mnist5k, split="test"),
        clips=256,
        frames=6,
        size=frame_size,
        count=1,
        digit_size=14,
        label="heading",
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Accuracy)]
test_evaluator = val_evaluator

optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05))
param_scheduler = [dict(type=OneCycleLR, eta_max=2e-3, by_epoch=False)]
train_cfg.update(max_iters=600, val_interval=200)
default_hooks["checkpoint"].update(interval=200)
