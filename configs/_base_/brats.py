"""BraTS-like cases: four modalities, three classes of tumour, trained and scored by the regions that BraTS scores.

A config of your own may set ``model["loss"]`` to that of ``_base_/volumes.py``, a loss of the classes. Every fifth case
is tested.
"""

from mmengine.config import read_base
from monai.losses import DeepSupervisionLoss
from monai.transforms import NormalizeIntensityd, Orientationd

from vision_ssm.data.layouts import brats_cases
from vision_ssm.data.patches import Patches
from vision_ssm.data.volumes import LoadVolumed, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice
from vision_ssm.engine.segmentation.regions import RegionDice, RegionLoss
from vision_ssm.engine.training.runner import AutocastOptimWrapper

with read_base():
    from .volumes import *

data_root = "data/BraTS"
score = "region_dice/mean"
classes = ("necrosis", "oedema", "enhancing")
modalities = (("t1", "t1n"), ("t1ce", "t1c"), ("t2", "t2w"), ("flair", "t2f"))  # as files end, to 2021 and since 2023
regions = dict(whole_tumour=(1, 2, 3), tumour_core=(1, 3), enhancing_tumour=(3,))
prepare = [
    dict(type=LoadVolumed, classes=((0,), (1,), (2,), (3, 4)), channels=4),  # 4 up to 2021, 3 since 2023
    dict(type=Orientationd, keys=("image", "label"), axcodes="RAS", labels=None, allow_missing_keys=True),
    dict(type=NormalizeIntensityd, keys="image", nonzero=True, channel_wise=True),
]
model["net"] = dict(spatial_dims=3, in_channels=4, out_channels=len(classes) + 1)
model["loss"] = dict(type=DeepSupervisionLoss, loss=dict(type=RegionLoss, regions=regions))
model["inferer"].update(roi_size=(128, 128, 128), sw_batch_size=2)

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    dataset=dict(
        type=Patches,
        items=dict(
            type=PreparedVolumes,
            data=dict(type=brats_cases, root=data_root, part="train"),
            transform=prepare,
        ),
        size=(128, 128, 128),
        rotate=0.3,
        scale=0.2,
        mirror=(0, 1, 2),
        gain=0.1,
        offset=0.1,
        noise=0.1,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=PreparedVolumes,
        data=dict(type=brats_cases, root=data_root, part="test"),
        transform=prepare,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=RegionDice, regions=regions)]
test_evaluator = [*val_evaluator, dict(type=Dice, structures=classes), dict(type=HD95, structures=classes)]

optim_wrapper.update(type=AutocastOptimWrapper)
train_cfg.update(max_iters=40_000, val_interval=2_000)
default_hooks["checkpoint"].update(interval=2_000)
