"""A task of the Decathlon, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.decathlon import *

model.update(net=dict(type=SegResNet, spatial_dims=3, in_channels=1, out_channels=3, init_filters=32))
