"""Synapse-like slices, control: MONAI's DynUNet, nnU-Net's network."""

from mmengine.config import read_base
from monai.networks.nets import DynUNet

with read_base():
    from .._base_.synapse import *

model["net"].update(
    type=DynUNet,
    kernel_size=(3,) * 5,
    strides=(1, 2, 2, 2, 2),
    upsample_kernel_size=(2,) * 4,
    filters=(32, 64, 128, 256, 512),
)
