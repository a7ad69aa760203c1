"""Deep-grey structures with U-Mamba in the bottleneck form; ``--set model.net.form=encoder`` is the other.

``--set model.net.mixer=identity`` is the same network without the state-space scan.
"""

from mmengine.config import read_base

from vision_ssm.segmentation import UMamba

with read_base():
    from .._base_.deep_grey import *

model.update(net=dict(type=UMamba, spatial_dims=2, in_channels=5, out_channels=7, channels=(16, 32, 64, 128, 160)))
