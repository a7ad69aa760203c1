"""Networks for volumes of 4.1 to 4.8 million parameters, to be compared under one budget.

Each of ours stands beside its twin, the same network without the state-space scan. SwinUNETR's width grows in steps of
12; its smallest is the lightest of all.
"""

from monai.networks.nets import DynUNet, SegResNet, SwinUNETR

from vision_ssm.segmentation import SegMamba, SSMUNet, UMamba

entrants = dict(
    ssm_unet=dict(
        type=SSMUNet,
        backbone="ssm3d_small",
        spatial_dims=3,
        in_channels=1,
        dims=(40, 80, 160, 224),
        depths=(2, 2, 2, 2),
    ),
    umamba=dict(type=UMamba, spatial_dims=3, in_channels=1, form="encoder", channels=(24, 48, 96, 128)),
    segmamba=dict(type=SegMamba, spatial_dims=3, in_channels=1, dims=(16, 32, 64, 96), hidden=96),
    dynunet=dict(
        type=DynUNet,
        spatial_dims=3,
        in_channels=1,
        kernel_size=(3,) * 5,
        strides=(1, 2, 2, 2, 2),
        upsample_kernel_size=(2,) * 4,
        filters=(16, 32, 64, 128, 192),
    ),
    segresnet=dict(type=SegResNet, spatial_dims=3, in_channels=1, init_filters=16),
    swin_unetr=dict(type=SwinUNETR, spatial_dims=3, in_channels=1, feature_size=12),
)
entrants.update(
    {f"{name}_identity": dict(entrants[name], mixer="identity") for name in ("ssm_unet", "umamba", "segmamba")}
)
