"""Segmentation slice by slice: patches of slices train, a sliding window over every slice labels a volume."""

from mmengine.config import read_base
from monai.inferers import SliceInferer

with read_base():
    from .volumes import *

model["inferer"] = dict(
    type=SliceInferer, roi_size=(224, 224), sw_batch_size=16, overlap=0.5, mode="gaussian", spatial_dim=2
)
