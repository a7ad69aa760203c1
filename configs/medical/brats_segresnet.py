"""BraTS-like cases, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.brats import *

model.update(net=dict(type=SegResNet, spatial_dims=3, in_channels=4, out_channels=4, init_filters=32))
