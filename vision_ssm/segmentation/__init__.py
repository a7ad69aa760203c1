"""Segmentation networks with MONAI's blocks: on timm backbones, from papers, and encoders for MONAI's own."""

from vision_ssm.segmentation.cine_unet import CineUNet
from vision_ssm.segmentation.encoder import SSMEncoder
from vision_ssm.segmentation.flexible_unet import VMambaEncoder, VolumeEncoder
from vision_ssm.segmentation.segmamba import SegMamba
from vision_ssm.segmentation.swin_umamba import SwinUMamba
from vision_ssm.segmentation.ultralight_vm_unet import UltraLightVMUNet
from vision_ssm.segmentation.umamba import UMamba
from vision_ssm.segmentation.unet import SSMUNet
from vision_ssm.segmentation.vm_unet import VMUNet

__all__ = [
    "CineUNet",
    "SSMEncoder",
    "SSMUNet",
    "SegMamba",
    "SwinUMamba",
    "UMamba",
    "UltraLightVMUNet",
    "VMUNet",
    "VMambaEncoder",
    "VolumeEncoder",
]
