"""Deep-grey structures as a volume with SSMUNet on our encoder of volumes.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SSMUNet

with read_base():
    from .._base_.deep_grey_3d import *

model["net"].update(type=SSMUNet, backbone="ssm3d_nano", deep_supervision=True)
