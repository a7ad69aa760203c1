"""ConvS5 of 2 layers and 32 channels on one small digit that moves, for a CPU: minutes of training."""

from mmengine.config import read_base
from mmengine.optim import OptimWrapper

from vision_ssm.video import convs5_stack

with read_base():
    from .._base_.moving_digits import *

frame_size = (24, 24)
model["net"].update(
    dim=32, encoder=(32, 32), decoder=(32, 32), stack=dict(type=convs5_stack, dim=32, state=32, layers=2)
)
model.update(context=8, grad_checkpointing=False)

train_dataloader.update(batch_size=4, num_workers=0)
train_dataloader["dataset"]["dataset"].update(size=frame_size, count=1, digit_size=12, frames=12)
val_dataloader["dataset"].update(size=frame_size, count=1, digit_size=12, frames=16, clips=8)
test_dataloader["dataset"].update(size=frame_size, count=1, digit_size=12, frames=28, clips=16)

optim_wrapper.update(type=OptimWrapper)
param_scheduler[0].update(start_factor=0.05, end=20)
param_scheduler[1].update(begin=20)
train_cfg.update(max_iters=600, val_interval=200)
default_hooks["checkpoint"].update(interval=200)
