"""Segmentation networks on any timm backbone, with MONAI's decoder blocks."""

from vision_ssm.segmentation.unet import SSMUNet

__all__ = ["SSMUNet"]
