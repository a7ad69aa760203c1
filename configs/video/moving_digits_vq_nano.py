"""A tokenizer of one small digit that moves, 64 codes for 2 x 2 pixels each, for a CPU: minutes of training."""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodeUsage, Tokenization
from vision_ssm.video import VQAutoencoder

with read_base():
    from .moving_digits_convs5_nano import *

model = dict(type=Tokenization, net=dict(type=VQAutoencoder, codes=64, size=16, encoder=(32, 32), decoder=(32, 32)))

val_evaluator = [*val_evaluator, dict(type=CodeUsage, codes=64)]
test_evaluator = val_evaluator
