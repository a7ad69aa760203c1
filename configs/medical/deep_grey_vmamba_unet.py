"""Deep-grey structures with a U-Net on vmamba_nano: three of its four maps, down to 1/16, so that no slice is padded.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SSMUNet

with read_base():
    from .._base_.deep_grey import *

model["net"].update(type=SSMUNet, backbone="vmamba_nano", out_indices=(0, 1, 2))
