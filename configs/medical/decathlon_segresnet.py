"""A task of the Decathlon, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.decathlon import *

model["net"].update(type=SegResNet, init_filters=32)
