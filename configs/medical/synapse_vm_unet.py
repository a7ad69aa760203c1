"""Synapse-like slices with VM-UNet; ``--set model.net.pretrained=FILE`` begins with VMamba-S's weights.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import VMUNet

with read_base():
    from .._base_.synapse import *

model.update(net=dict(type=VMUNet, spatial_dims=2, in_channels=1, out_channels=9, deep_supervision=True))
