"""ACDC-like slices with a U-Net on vmamba_tiny; any timm backbone may be its encoder.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SSMUNet

with read_base():
    from .._base_.acdc import *

model["net"].update(type=SSMUNet, backbone="vmamba_tiny", deep_supervision=True)
