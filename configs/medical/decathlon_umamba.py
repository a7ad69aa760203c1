"""A task of the Decathlon with U-Mamba in the bottleneck form; ``--set model.net.form=encoder`` is the other.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import UMamba

with read_base():
    from .._base_.decathlon import *

model["net"].update(type=UMamba, deep_supervision=True)
