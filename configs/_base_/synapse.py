"""Synapse-like abdominal CT: slices and test volumes as arrays without spacing, so distances are in voxels.

There is no ``prepare``, so ``vision-ssm predict`` does not take these configs: the arrays do not say how a scan in
another file was turned and scaled to become one.
"""

from mmengine.config import read_base

from vision_ssm.data.layouts import synapse_arrays
from vision_ssm.data.patches import Patches
from vision_ssm.engine.metrics import HD95, Dice

with read_base():
    from .slices import *

data_root = "data/Synapse"
classes = ("aorta", "gallbladder", "left_kidney", "right_kidney", "liver", "pancreas", "spleen", "stomach")
model["net"] = dict(spatial_dims=2, in_channels=1, out_channels=len(classes) + 1)

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        type=Patches,
        items=dict(type=synapse_arrays, root=data_root, part="train", classes=9),
        size=(224, 224),
        rotate=0.35,
        scale=0.2,
        mirror=(0,),
        gain=0.1,
        offset=0.1,
        noise=0.05,
    ),
)
val_dataloader = dict(batch_size=1, dataset=dict(type=synapse_arrays, root=data_root, part="test", classes=9))
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [dict(type=Dice, structures=classes), dict(type=HD95, structures=classes)]

train_cfg.update(max_iters=20_000, val_interval=2_000)
default_hooks["checkpoint"].update(interval=2_000)
