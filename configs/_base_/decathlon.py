"""A task of the Medical Segmentation Decathlon, Task04_Hippocampus here; every fifth case is tested.

For another task change, in a config of your own, what depends on it: ``data_root``, the classes here and in
``prepare``, its ``channels``, the spacing, the intensities (a CT needs ``ScaleIntensityRanged``), and the patch.
"""

from mmengine.config import read_base
from monai.transforms import NormalizeIntensityd, Orientationd, Spacingd

from vision_ssm.data.layouts import decathlon_cases
from vision_ssm.data.patches import Patches
from vision_ssm.data.volumes import LoadVolumed, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice

with read_base():
    from .volumes import *

data_root = "data/Task04_Hippocampus"
classes = ("anterior", "posterior")
prepare = [
    dict(type=LoadVolumed, classes=3, channels=1),
    dict(type=Orientationd, keys=("image", "label"), axcodes="RAS", labels=None, allow_missing_keys=True),
    dict(type=Spacingd, keys="image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
    dict(type=Spacingd, keys="label", pixdim=(1.0, 1.0, 1.0), mode="nearest", allow_missing_keys=True),
    dict(type=NormalizeIntensityd, keys="image", channel_wise=True),
]
model["net"] = dict(spatial_dims=3, in_channels=1, out_channels=len(classes) + 1)
model["inferer"].update(roi_size=(32, 64, 32))

train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type=Patches,
        items=dict(
            type=PreparedVolumes,
            data=dict(type=decathlon_cases, root=data_root, part="train"),
            transform=prepare,
        ),
        size=(32, 64, 32),
        rotate=0.3,
        scale=0.2,
        gain=0.2,
        offset=0.2,
        noise=0.1,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=PreparedVolumes,
        data=dict(type=decathlon_cases, root=data_root, part="test"),
        transform=prepare,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [dict(type=Dice, structures=classes), dict(type=HD95, structures=classes)]

train_cfg.update(max_iters=10_000, val_interval=1_000)
default_hooks["checkpoint"].update(interval=1_000)
