"""Deep-grey structures as a volume, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.deep_grey_3d import *

model.update(net=dict(type=SegResNet, spatial_dims=3, in_channels=1, out_channels=7, init_filters=16))
