"""The deep-grey structures of the embedded brain as a volume: the left half trains, the mirrored right half is tested.

Intensities are normalised over the whole image before it is cut, as they are when a new volume is labelled.
"""

from mmengine.config import read_base
from monai.transforms import NormalizeIntensityd, Orientationd

from vision_ssm.data.deep_grey import Hemisphered, deep_grey_files
from vision_ssm.data.patches import Patches
from vision_ssm.data.volumes import LoadVolumed, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice

with read_base():
    from .volumes import *

classes = ("hippocampus", "amygdala", "caudate", "putamen", "pallidum", "thalamus")
prepare = [
    dict(type=LoadVolumed, classes=7),
    dict(type=Orientationd, keys=("image", "label"), axcodes="RAS", labels=None, allow_missing_keys=True),
    dict(type=NormalizeIntensityd, keys="image"),
]
model["net"] = dict(spatial_dims=3, in_channels=1, out_channels=len(classes) + 1)
# Windows are halves along x, as in training: a window across the midline would show what was never seen.
model["inferer"].update(roi_size=(48, 64, 64), overlap=(0.0, 0.5, 0.5))

train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type=Patches,
        items=dict(
            type=PreparedVolumes,
            data=dict(type=deep_grey_files),
            transform=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="left")],
        ),
        size=(48, 64, 64),
        rotate=0.2,
        scale=0.15,
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
        data=dict(type=deep_grey_files),
        transform=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="right")],
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [dict(type=Dice, structures=classes), dict(type=HD95, structures=classes)]
