"""A tokenizer of RGB frames of a folder of videos: a VQ autoencoder with 1024 codes, one for 4 x 4 pixels.

    vision-ssm train video/folder_vq --set data_root=VIDEOS

The folder is laid out as ``folder_convs5`` says. Frames are learnt one by one, from short clips; the schedule is ours.
"""

from mmengine.config import read_base

from vision_ssm.engine.video.codes import CodeUsage, Tokenization
from vision_ssm.video import VQAutoencoder

with read_base():
    from .folder_convs5 import *

model = dict(type=Tokenization, net=dict(type=VQAutoencoder, channels=3, codes=1024))

train_dataloader["dataset"]["dataset"].update(frames=16, every=16)
val_dataloader["dataset"].update(frames=16)
test_dataloader["dataset"] = val_dataloader["dataset"]
val_evaluator = [*val_evaluator, dict(type=CodeUsage, codes=1024)]
test_evaluator = val_evaluator

optim_wrapper["optimizer"].update(lr=4e-4)
