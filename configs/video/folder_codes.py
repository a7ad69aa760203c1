"""ConvS5 over the codes of the RGB frames of a folder of videos, 8 layers and 256 channels.

    vision-ssm train video/folder_codes --set data_root=VIDEOS

The tokenizer comes first: vision-ssm train video/folder_vq --set data_root=VIDEOS --work-dir runs/folder_vq
"""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodePrediction
from vision_ssm.video import CodedVideo, NextCode, VQAutoencoder, convs5_stack

with read_base():
    from .folder_convs5 import *

model = dict(
    type=CodePrediction,
    net=dict(
        type=CodedVideo,
        tokenizer=dict(type=VQAutoencoder, channels=3, codes=1024),
        model=dict(
            type=NextCode,
            stack=dict(type=convs5_stack, dim=256, state=256, layers=8),
            codes=1024,
            dim=256,
            decoder=(256,),
        ),
    ),
    context=16,
    tokenizer="runs/folder_vq/weights.safetensors",
)
