"""Models of video: what comes next."""

from vision_ssm.video.captured_step import CapturedStep
from vision_ssm.video.clip_classifier import ClipClassifier
from vision_ssm.video.conv_lstm import ConvLSTM
from vision_ssm.video.convs5 import convs5_stack
from vision_ssm.video.models import CODE_MODELS, MODELS
from vision_ssm.video.next_code import CodedVideo, NextCode, Sampler, code_loss
from vision_ssm.video.next_frame import NextFrame, pixel_loss
from vision_ssm.video.next_map import NextMap, Rollout
from vision_ssm.video.tokenizer import Tokenizer, VQAutoencoder
from vision_ssm.video.transformer import FrameTransformer

__all__ = [
    "CODE_MODELS",
    "MODELS",
    "CapturedStep",
    "ClipClassifier",
    "CodedVideo",
    "ConvLSTM",
    "FrameTransformer",
    "NextCode",
    "NextFrame",
    "NextMap",
    "Rollout",
    "Sampler",
    "Tokenizer",
    "VQAutoencoder",
    "code_loss",
    "convs5_stack",
    "pixel_loss",
]
