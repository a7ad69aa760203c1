"""BraTS-like cases, control: MONAI's SwinUNETR, which takes multiples of 32 alone."""

from mmengine.config import read_base
from monai.networks.nets import SwinUNETR

with read_base():
    from .._base_.brats import *

model.update(net=dict(type=SwinUNETR, spatial_dims=3, in_channels=4, out_channels=4, feature_size=48))
