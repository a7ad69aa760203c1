"""ConvS5 over the codes of moving digits, 8 layers and 256 channels, as wide as the model in pixels.

The tokenizer comes first: vision-ssm train video/moving_digits_vq --work-dir runs/moving_digits_vq
"""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodePrediction
from vision_ssm.video import CodedVideo, NextCode, VQAutoencoder, convs5_stack

with read_base():
    from .._base_.moving_digits import *

model = dict(
    type=CodePrediction,
    net=dict(
        type=CodedVideo,
        tokenizer=dict(type=VQAutoencoder, codes=512),
        model=dict(
            type=NextCode,
            stack=dict(type=convs5_stack, dim=256, state=256, layers=8),
            codes=512,
            dim=256,
            decoder=(256,),
        ),
    ),
    context=100,
    tokenizer="runs/moving_digits_vq/weights.safetensors",
)

optim_wrapper["optimizer"].update(lr=5e-4)
