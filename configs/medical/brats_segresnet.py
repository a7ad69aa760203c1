"""BraTS-like cases, control: MONAI's SegResNet."""

from mmengine.config import read_base
from monai.networks.nets import SegResNet

with read_base():
    from .._base_.brats import *

model["net"].update(type=SegResNet, init_filters=32)
