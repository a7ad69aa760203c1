"""Networks under one budget on an abdominal CT at 3 mm: the left half trains, the mirrored right half is tested.

``data_root`` is a folder with ct.nii.gz and labels7.nii.gz, the case of TotalSegmentator's tests with its classes
merged to 1 liver, 2 spleen, 3 kidneys, 4 bladder, 5 great vessels, 6 bone, 7 muscle. Liver and spleen lie on one side
each, so here they are background.
"""

from mmengine.config import read_base
from monai.transforms import Orientationd, ScaleIntensityRanged

from vision_ssm.data.deep_grey import Hemisphered
from vision_ssm.data.layouts import one_case
from vision_ssm.data.patches import Patches
from vision_ssm.data.volumes import LoadVolumed, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice
from vision_ssm.engine.training.runner import AutocastOptimWrapper

with read_base():
    from .._base_.entrants import *
    from .._base_.volumes import *

data_root = "data/ct_abdomen_3mm"
notes = (
    "One CT of one patient at 3 mm, labelled by a network (TotalSegmentator), so a score is agreement with that "
    "network. The left half trains, the mirrored right half of the same patient is tested. Liver and spleen are "
    "background, as each lies on one side."
)
classes = ("kidneys", "urinary_bladder", "great_vessels", "bone", "muscle")
prepare = [
    dict(type=LoadVolumed, classes=((0, 1, 2), (3,), (4,), (5,), (6,), (7,))),
    dict(type=Orientationd, keys=("image", "label"), axcodes="RAS", labels=None, allow_missing_keys=True),
    dict(type=ScaleIntensityRanged, keys="image", a_min=-200.0, a_max=300.0, b_min=-1.0, b_max=1.0, clip=True),
]
model.update(net=dict(entrants["ssm_unet"], out_channels=6))
model["inferer"].update(roi_size=(64, 64, 64))

train_dataloader = dict(
    batch_size=2,
    num_workers=8,
    dataset=dict(
        type=Patches,
        items=dict(
            type=PreparedVolumes,
            data=dict(type=one_case, root=data_root, image="ct.nii.gz", label="labels7.nii.gz"),
            transform=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="left")],
        ),
        size=(64, 64, 64),
        rotate=0.2,
        scale=0.15,
        gain=0.1,
        offset=0.1,
        noise=0.05,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=PreparedVolumes,
        data=dict(type=one_case, root=data_root, image="ct.nii.gz", label="labels7.nii.gz"),
        transform=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="right")],
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [dict(type=Dice, structures=classes), dict(type=HD95, structures=classes, spacing=(3.0, 3.0, 3.0))]

optim_wrapper.update(type=AutocastOptimWrapper)
