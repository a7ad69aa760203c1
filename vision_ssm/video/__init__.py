"""Models of video: what comes next."""

from vision_ssm.video.convs5 import MODELS, ConvS5Video, pixel_loss

__all__ = ["MODELS", "ConvS5Video", "pixel_loss"]
