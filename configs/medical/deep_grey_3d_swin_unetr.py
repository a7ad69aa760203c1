"""Deep-grey structures as a volume, control: MONAI's SwinUNETR, which takes multiples of 32 alone."""

from mmengine.config import read_base
from monai.networks.nets import SwinUNETR

with read_base():
    from .._base_.deep_grey_3d import *

model["net"].update(type=SwinUNETR, feature_size=24)
model["inferer"].update(roi_size=(64, 64, 64))
train_dataloader["dataset"].update(size=(64, 64, 64))
