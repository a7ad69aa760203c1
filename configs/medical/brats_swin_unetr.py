"""BraTS-like cases, control: MONAI's SwinUNETR, which takes multiples of 32 alone."""

from mmengine.config import read_base
from monai.networks.nets import SwinUNETR

with read_base():
    from .._base_.brats import *

model["net"].update(type=SwinUNETR, feature_size=48)
