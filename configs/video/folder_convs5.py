"""ConvS5 of 8 layers and 128 channels on a folder of videos, those in ``train/`` and ``test/``.

    vision-ssm train video/folder_convs5 --set data_root=VIDEOS

Lists of files, ``train.txt`` and ``test.txt``, will do. Frames are RGB, 64 x 64 pixels; clips of 48 train, 48 frames
follow a context of 16. The sizes are those of the published setting of 600 frames, the schedule is ours.
"""

from mmengine.config import read_base

from vision_ssm.data.video_folder import VideoFolder
from vision_ssm.video import convs5_stack

with read_base():
    from .._base_.moving_digits import *

data_root = "data/videos"
model["net"].update(channels=3, dim=128, stack=dict(type=convs5_stack, dim=128, state=128, layers=8))
model.update(context=16)

train_dataloader["dataset"]["dataset"] = dict(
    type=VideoFolder, root=data_root, part="train", frames=48, size=frame_size, every=16
)
val_dataloader["dataset"] = dict(type=VideoFolder, root=data_root, part="test", frames=64, size=frame_size)
test_dataloader["dataset"] = val_dataloader["dataset"]

optim_wrapper["optimizer"].update(lr=5e-4)
param_scheduler[0].update(end=1_000)
param_scheduler[1].update(begin=1_000)
train_cfg.update(max_iters=50_000, val_interval=5_000)
default_hooks["checkpoint"].update(interval=5_000)
