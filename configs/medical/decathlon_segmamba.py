"""A task of the Decathlon with SegMamba.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SegMamba

with read_base():
    from .._base_.decathlon import *

model["net"].update(type=SegMamba, deep_supervision=True)
