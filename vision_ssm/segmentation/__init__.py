"""Segmentation networks on timm backbones, with MONAI's blocks: ours, and encoders for MONAI's own."""

from vision_ssm.segmentation.flexible_unet import VMambaEncoder
from vision_ssm.segmentation.unet import SSMUNet

__all__ = ["SSMUNet", "VMambaEncoder"]
