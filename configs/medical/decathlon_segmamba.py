"""A task of the Decathlon with SegMamba.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SegMamba

with read_base():
    from .._base_.decathlon import *

model.update(net=dict(type=SegMamba, spatial_dims=3, in_channels=1, out_channels=3, deep_supervision=True))
