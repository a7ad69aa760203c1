"""Six deep-grey structures of the embedded brain: the left half trains, the mirrored right half is tested.

Intensities are normalised over the whole image before it is cut, as they are when a new volume is labelled.
"""

from mmengine.config import read_base
from mmengine.optim import OneCycleLR, OptimWrapper
from monai.inferers import SliceInferer
from monai.losses import DiceCELoss
from monai.transforms import Compose, NormalizeIntensityd, Orientationd
from torch.optim import AdamW

from vision_ssm.data.augment import RandomAffine, RandomIntensity
from vision_ssm.data.deep_grey import Hemisphered, deep_grey_files
from vision_ssm.data.draws import Draws
from vision_ssm.data.volumes import AxialSlices, LoadVolumed, NeighbourSlicesd, PreparedVolumes
from vision_ssm.engine.metrics import HD95, Dice
from vision_ssm.engine.tasks import Segmentation

with read_base():
    from .runtime import *

score = "dice/mean"  # shown while training
classes = ("hippocampus", "amygdala", "caudate", "putamen", "pallidum", "thalamus")
prepare = [
    dict(type=LoadVolumed, classes=7),
    dict(type=Orientationd, keys=("image", "label"), axcodes="RAS", labels=None, allow_missing_keys=True),
    dict(type=NormalizeIntensityd, keys="image"),
    dict(type=NeighbourSlicesd, keys="image", neighbours=2),
]

model = dict(
    type=Segmentation,
    net=dict(spatial_dims=2, in_channels=5, out_channels=len(classes) + 1),
    loss=dict(type=DiceCELoss, to_onehot_y=True, softmax=True, batch=True, lambda_ce=0.2),
    # Windows are halves, as in training: a window across the midline would show what was never seen.
    inferer=dict(type=SliceInferer, roi_size=(48, 96), overlap=0.0, sw_batch_size=16, spatial_dim=2),
    augment=[
        dict(type=RandomAffine, shift=(4, 6), rotate=0.1, scale=0.1, mirror=0.5),
        dict(type=RandomIntensity, gain=0.2, offset=0.2),
    ],
)

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        type=Draws,
        dataset=dict(
            type=AxialSlices,
            volumes=dict(
                type=PreparedVolumes,
                data=dict(type=deep_grey_files),
                transform=dict(
                    type=Compose,
                    transforms=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="left")],
                ),
            ),
        ),
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=PreparedVolumes,
        data=dict(type=deep_grey_files),
        transform=dict(
            type=Compose,
            transforms=[*prepare, dict(type=Hemisphered, keys=("image", "label"), side="right")],
        ),
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=Dice, structures=classes)]
test_evaluator = [dict(type=Dice, structures=classes), dict(type=HD95, structures=classes)]

optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=8e-3, weight_decay=1e-4))
param_scheduler = [dict(type=OneCycleLR, eta_max=8e-3, by_epoch=False)]
