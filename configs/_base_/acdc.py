"""ACDC-like cardiac MR: the labelled frames of each patient, slice by slice; every fifth patient is tested.

The files keep their order of axes, of which the last is the one between slices.
"""

from mmengine.config import read_base
from monai.transforms import NormalizeIntensityd, Spacingd

from vision_ssm.data.layouts import acdc_cases
from vision_ssm.data.patches import Patches
from vision_ssm.data.volumes import AxialSlices, LoadVolumed, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice

with read_base():
    from .slices import *

data_root = "data/ACDC/database/training"
classes = ("right_ventricle", "myocardium", "left_ventricle")
prepare = [
    dict(type=LoadVolumed, classes=4),
    dict(type=Spacingd, keys="image", pixdim=(1.5, 1.5, -1.0), mode="bilinear"),  # slices stay as they are
    dict(type=Spacingd, keys="label", pixdim=(1.5, 1.5, -1.0), mode="nearest", allow_missing_keys=True),
    dict(type=NormalizeIntensityd, keys="image"),
]

model["net"] = dict(spatial_dims=2, in_channels=1, out_channels=len(classes) + 1)

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        type=Patches,
        items=dict(
            type=AxialSlices,
            volumes=dict(
                type=PreparedVolumes,
                data=dict(type=acdc_cases, root=data_root, part="train"),
                transform=prepare,
            ),
        ),
        size=(224, 224),
        rotate=3.14,
        scale=0.2,
        mirror=(0,),
        gain=0.2,
        offset=0.2,
        noise=0.1,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=PreparedVolumes,
        data=dict(type=acdc_cases, root=data_root, part="test"),
        transform=prepare,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [
    dict(type=Dice, structures=classes),
    dict(type=HD95, structures=classes, spacing=(1.5, 1.5, 10.0)),
]

train_cfg.update(max_iters=10_000, val_interval=1_000)
default_hooks["checkpoint"].update(interval=1_000)
