"""ACDC-like slices with VM-UNet; ``--set model.net.pretrained=FILE`` begins with VMamba-S's weights.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import VMUNet

with read_base():
    from .._base_.acdc import *

model["net"].update(type=VMUNet, deep_supervision=True)
