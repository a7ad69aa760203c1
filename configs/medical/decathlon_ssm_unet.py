"""A task of the Decathlon with SSMUNet on our encoder of volumes.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SSMUNet

with read_base():
    from .._base_.decathlon import *

model["net"].update(type=SSMUNet, backbone="ssm3d_small", deep_supervision=True)
