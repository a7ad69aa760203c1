"""ACDC-like cine MR, slice by slice as clips: a U-Net on vmamba_tiny with ConvS5 between its frames.

The end-diastolic and end-systolic frames have labels; the network sees the frames between them, too. Every fifth
patient is tested. ``--set model.net.mixer=identity`` is the same network frame by frame.
"""

from mmengine.config import read_base
from mmengine.optim import OneCycleLR
from monai.losses import DiceCELoss
from torch.optim import AdamW

from vision_ssm.data.augment import RandomAffine, RandomIntensity
from vision_ssm.data.cine import CineSlices, acdc_cines
from vision_ssm.data.draws import Draws
from vision_ssm.engine.metrics import Dice
from vision_ssm.engine.training.runner import AutocastOptimWrapper
from vision_ssm.engine.video.clips import CineSegmentation
from vision_ssm.segmentation import CineUNet, SSMUNet

with read_base():
    from .._base_.runtime import *

data_root = "data/ACDC/database/training"
score = "dice/mean"  # shown while training
classes = ("right_ventricle", "myocardium", "left_ventricle")
modalities = ("4d",)  # in a patient's folder, the cine is the file that ends in this

model = dict(
    type=CineSegmentation,
    net=dict(
        type=CineUNet,
        net=dict(type=SSMUNet, backbone="vmamba_tiny", in_channels=1, out_channels=len(classes) + 1),
        mixer="convs5",
        levels=(-1, -2),
    ),
    loss=dict(type=DiceCELoss, to_onehot_y=True, softmax=True, batch=True),
    augment=[
        dict(type=RandomAffine, shift=(16, 16), rotate=3.14, scale=0.2, mirror=0.5),
        dict(type=RandomIntensity, gain=0.2, offset=0.2),
    ],
)

train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        type=Draws,
        dataset=dict(
            type=CineSlices,
            cases=dict(type=acdc_cines, root=data_root, part="train"),
            frames=12,
            size=(192, 192),
            spacing=1.5,
            classes=len(classes) + 1,
        ),
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=CineSlices,
        cases=dict(type=acdc_cines, root=data_root, part="test"),
        frames=12,
        size=(192, 192),
        spacing=1.5,
        classes=len(classes) + 1,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = val_evaluator

optim_wrapper = dict(type=AutocastOptimWrapper, optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-2))
param_scheduler = [dict(type=OneCycleLR, eta_max=1e-3, by_epoch=False)]
train_cfg.update(max_iters=10_000, val_interval=1_000)
default_hooks["checkpoint"].update(interval=1_000)
