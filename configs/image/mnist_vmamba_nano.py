"""Ten digits: vmamba_nano on 4000 real MNIST images, 1000 others tested."""

from mmengine.config import read_base
from mmengine.optim import OneCycleLR, OptimWrapper
from timm.models import create_model
from torch.optim import AdamW

from vision_ssm.data.draws import Draws
from vision_ssm.data.images import mnist5k
from vision_ssm.engine.metrics import Accuracy
from vision_ssm.engine.tasks import Classification

with read_base():
    from .._base_.runtime import *

score = "accuracy/top1"  # shown while training
classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

model = dict(
    type=Classification,
    net=dict(type=create_model, model_name="vmamba_nano", in_chans=1, num_classes=10),
    label_smoothing=0.1,
)

train_dataloader = dict(batch_size=64, dataset=dict(type=Draws, dataset=dict(type=mnist5k, split="train")))
val_dataloader = dict(batch_size=250, dataset=dict(type=mnist5k, split="test"))
test_dataloader = val_dataloader
val_evaluator = [dict(type=Accuracy)]
test_evaluator = val_evaluator

optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05))
param_scheduler = [dict(type=OneCycleLR, eta_max=2e-3, by_epoch=False)]
