"""Deep-grey structures as a volume, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.deep_grey_3d import *

model["net"].update(type=SegResNet, init_filters=16)
