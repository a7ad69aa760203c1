"""Networks under one budget on the deep-grey volume: the left half trains, the mirrored right half is tested."""

from mmengine.config import read_base

from vision_ssm.engine.training.runner import AutocastOptimWrapper

with read_base():
    from .._base_.deep_grey_3d import *
    from .._base_.entrants import *

notes = (
    "One T1 image of one person (Colin27), six structures labelled by hand in the AAL atlas. The left half trains, the "
    "mirrored right half of the same brain is tested: the halves resemble each other far more than two people do."
)
model["net"].update(entrants["ssm_unet"])
# 64 along every axis is what all networks take, SwinUNETR included; the halves are 48 wide and padded.
model["inferer"].update(roi_size=(64, 64, 64), overlap=0.5)
train_dataloader["dataset"].update(size=(64, 64, 64))
train_dataloader.update(num_workers=8)
optim_wrapper.update(type=AutocastOptimWrapper)
