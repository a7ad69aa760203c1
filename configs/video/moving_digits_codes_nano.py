"""ConvS5 of 2 layers and 32 channels over the codes of one small digit that moves, for a CPU: minutes of training.

The tokenizer comes first: vision-ssm train video/moving_digits_vq_nano --work-dir runs/moving_digits_vq_nano
"""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodePrediction
from vision_ssm.video import CodedVideo, NextCode, VQAutoencoder, convs5_stack

with read_base():
    from .moving_digits_convs5_nano import *

model = dict(
    type=CodePrediction,
    net=dict(
        type=CodedVideo,
        tokenizer=dict(type=VQAutoencoder, codes=64, size=16, encoder=(32, 32), decoder=(32, 32)),
        model=dict(
            type=NextCode,
            stack=dict(type=convs5_stack, dim=32, state=32, layers=2),
            codes=64,
            dim=32,
            embedding=32,
            encoder=(32,),
            decoder=(64,),
            decoder_units=1,
        ),
    ),
    context=8,
    tokenizer="runs/moving_digits_vq_nano/weights.safetensors",
)
