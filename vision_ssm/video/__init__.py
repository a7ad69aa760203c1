"""Models of video: what comes next."""

from vision_ssm.video.convs5 import MODELS, convs5_stack
from vision_ssm.video.next_frame import NextFrame, pixel_loss

__all__ = ["MODELS", "NextFrame", "convs5_stack", "pixel_loss"]
