"""The table of segmentation networks in the README: each is built and counted, never typed."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR
from torch import nn

from vision_ssm.segmentation import SegMamba, SSMUNet, SwinUMamba, UltraLightVMUNet, UMamba, VMUNet

__all__ = ["render"]

SEVEN_STAGES = (32, 64, 128, 256, 512, 512, 512)
DYNUNET = partial(DynUNet, 3, kernel_size=[3] * 6, strides=[1, *[2] * 5], upsample_kernel_size=[2] * 5)

CAPTION = (
    'The identity twin is `mixer="identity"`: the same network without its scans, and in UMamba, SegMamba and '
    "UltraLightVMUNet without the convolutions that feed them. Published sizes are those of the paper named; "
    "those with a star were not checked against its text."
)


class Row(NamedTuple):
    """A network, the channels and classes that it is counted with, and its size in the literature."""

    name: str
    network: Callable[..., nn.Module]
    in_channels: int
    out_channels: int
    published: str = ""

    def parameters(self, **arguments: str) -> str:
        """In millions."""
        with torch.device("meta"):
            net = self.network(in_channels=self.in_channels, out_channels=self.out_channels, **arguments)
        total = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        return f"{total:.2f}" if total >= 1 else f"{total:.3f}"


def swin_unetr(in_channels: int, out_channels: int) -> nn.Module:
    """SwinUNETR, which reads numbers from a tensor while it is built."""
    with torch.device("cpu"):
        return SwinUNETR(in_channels=in_channels, out_channels=out_channels, feature_size=48)


OURS = (
    Row("`SSMUNet` on `vmamba_tiny`, 2-D", partial(SSMUNet, "vmamba_tiny"), 1, 14),
    Row("`SSMUNet` on `ssm3d_small`, 3-D", partial(SSMUNet, "ssm3d_small", spatial_dims=3), 1, 14),
    Row(
        "`UMamba`, 2-D, seven stages",
        partial(UMamba, 2, channels=SEVEN_STAGES),
        1,
        14,
        "63* (arXiv:2402.03302)",
    ),
    Row(
        '`UMamba`, `form="encoder"`, 2-D, seven stages',
        partial(UMamba, 2, channels=SEVEN_STAGES, form="encoder"),
        1,
        14,
        "67* (arXiv:2402.03302)",
    ),
    Row("`UMamba`, 3-D", partial(UMamba, 3), 1, 14),
    Row('`UMamba`, `form="encoder"`, 3-D', partial(UMamba, 3, form="encoder"), 1, 14),
    Row("`SegMamba`, 3-D", partial(SegMamba, 3), 4, 4),
    Row(
        "`SegMamba`, `depths=(1, 1, 1, 1), mambas=2`, 3-D",
        partial(SegMamba, 3, depths=(1, 1, 1, 1), mambas=2),
        4,
        4,
    ),
    Row("`VMUNet`, 2-D", partial(VMUNet, 2), 3, 1, "27.43* (by later papers)"),
    Row("`SwinUMamba`, 2-D", partial(SwinUMamba, 2), 3, 7, "60* (arXiv:2402.03302)"),
    Row("`UltraLightVMUNet`, 2-D", partial(UltraLightVMUNet, 2), 3, 1, "0.049 (arXiv:2403.20035)"),
)
MONAI = (
    Row("MONAI DynUNet, six stages, 3-D", DYNUNET, 1, 14),
    Row("MONAI SegResNet, `init_filters=32`, 3-D", partial(SegResNet, 3, init_filters=32), 4, 4),
    Row("MONAI SwinUNETR, `feature_size=48`, 3-D", swin_unetr, 4, 4),
)


def render() -> str:
    """Markdown: every network of the package with its control, and the networks of MONAI beside them."""
    lines = [
        "| network | channels in, classes | parameters (M) | identity twin (M) | published (M) |",
        "|---|---|---:|---:|---|",
    ]
    for row in (*OURS, *MONAI):
        twin = row.parameters(mixer="identity") if row in OURS else ""
        lines.append(
            f"| {row.name} | {row.in_channels}, {row.out_channels} | {row.parameters()} | {twin} | {row.published} |"
        )
    return "\n".join([*lines, "", CAPTION])
