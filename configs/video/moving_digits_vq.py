"""A tokenizer of moving digits: a VQ autoencoder with 512 codes, one for 4 x 4 pixels, so that maps are 16 x 16.

Frames are learnt one by one, from short clips; the schedule is ours.
"""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodeUsage, Tokenization
from vision_ssm.video import VQAutoencoder

with read_base():
    from .._base_.moving_digits import *

model = dict(type=Tokenization, net=dict(type=VQAutoencoder, codes=512))

train_dataloader["dataset"]["dataset"].update(frames=16)
val_dataloader["dataset"].update(frames=16)
test_dataloader["dataset"].update(frames=16)
val_evaluator = [*val_evaluator, dict(type=CodeUsage, codes=512)]
test_evaluator = val_evaluator

optim_wrapper["optimizer"].update(lr=4e-4)
param_scheduler[0].update(end=500)
param_scheduler[1].update(begin=500)
train_cfg.update(max_iters=30_000, val_interval=3_000)
default_hooks["checkpoint"].update(interval=3_000)
