"""Segmentation of volumes: patches train, a sliding window with Gaussian weights labels a case."""

from mmengine.config import read_base
from mmengine.optim import OneCycleLR, OptimWrapper
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch.optim import AdamW

from vision_ssm.engine.tasks import Segmentation

with read_base():
    from .runtime import *

score = "dice/mean"  # shown while training

model = dict(
    type=Segmentation,
    loss=dict(
        type=DeepSupervisionLoss,  # of one output or, while a network supervises deeply, of a list
        loss=dict(type=DiceCELoss, to_onehot_y=True, softmax=True, batch=True),
    ),
    inferer=dict(type=SlidingWindowInferer, roi_size=(96, 96, 96), sw_batch_size=4, overlap=0.5, mode="gaussian"),
)

optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-5), clip_grad=dict(max_norm=12.0)
)
param_scheduler = [dict(type=OneCycleLR, eta_max=1e-3, by_epoch=False)]
