"""Synapse-like slices with Swin-UMamba; ``--set model.net.pretrained=FILE`` begins with VMamba-T's weights.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import SwinUMamba

with read_base():
    from .._base_.synapse import *

model["net"].update(type=SwinUMamba, deep_supervision=True)
