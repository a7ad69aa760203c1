"""Deep-grey structures as a volume with SegMamba.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SegMamba

with read_base():
    from .._base_.deep_grey_3d import *

model["net"].update(type=SegMamba, dims=(24, 48, 96, 192), hidden=256, deep_supervision=True)
