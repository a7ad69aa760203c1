"""Deep-grey structures with UltraLight VM-UNet.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import UltraLightVMUNet

with read_base():
    from .._base_.deep_grey import *

model["net"].update(type=UltraLightVMUNet)
