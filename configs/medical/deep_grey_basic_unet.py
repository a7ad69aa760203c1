"""Deep-grey structures, plain control: MONAI's BasicUNet of 0.86 M parameters, one-cycle to 6e-3."""

from mmengine.config import read_base
from monai.networks.nets import BasicUNet

with read_base():
    from .._base_.deep_grey import *

model["net"].update(type=BasicUNet, features=(16, 24, 48, 96, 144, 16))
param_scheduler[0].update(eta_max=6e-3)
