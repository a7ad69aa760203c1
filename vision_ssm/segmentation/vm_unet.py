"""VM-UNet: a U-Net of VMamba's blocks, encoder and decoder.

Ruan, Li and Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", arXiv:2402.02491.
"""

# Shapes: b batch, c channels, h w the image.

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from os import PathLike
from typing import Any

import timm
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vision_ssm.backbones.hierarchy import Stage
from vision_ssm.backbones.pretrained import create_pretrained
from vision_ssm.layers.mixers import Mixer

from .decoder import Decoder, WithoutSkip
from .padding import pad_image, require_channels

__all__ = ["VMUNet"]


class VMUNet(nn.Module):
    """U-Net of VMamba's blocks: patch embedding, patch merging, patch expanding, and skips that are added.

    What the paper leaves open, and what we read: a skip is the map after the last block of an encoder stage, and is
    added to what patch expanding returns. The final projection expands each cell to 4 x 4 with a quarter of the first
    stage's channels; with three channels in and one out the network then has 27.43 M parameters, the
    count in later papers (not checked here). Deep supervision is ours: a 1 x 1 convolution on each decoder stage.

    Args:
        spatial_dims: axes of the image; 2.
        in_channels: channels of the image.
        out_channels: classes, background included.
        backbone: timm name of a VMamba, which gives the widths and the design of the blocks.
        depths: blocks of each stage of the encoder.
        decoder_depths: blocks of each stage of the decoder, coarsest first.
        pretrained: True for timm's weights of the backbone, a file of such weights, or False. They fill both halves, as
            in the paper, each decoder stage from the encoder's of the same width; stages that are shorter than the
            backbone's take its first blocks. The patch embedding is adapted to ``in_channels``. Patch expanding and
            the projections to classes have no counterpart and begin at random.
        mixer: what mixes the cells inside a block: a name in ``vision_ssm.layers.MIXERS`` or a callable; "identity" is
            the same network without the SSM.
        drop_path_rate: stochastic depth, rising to this along the encoder and falling from it along the decoder.
        deep_supervision: also predict at 1/4, 1/8 and 1/16 while training.

    Shapes: (b, in_channels, h, w) -> (b, out_channels, h, w) for any h, w >= 1; the image is padded by repeating its
    last cells, and the logits are cropped. With deep supervision, and only while training, a list of such logits,
    finest first; a level reduced by r has ceil(h / r) rows and ceil(w / r) columns.

    Raises:
        ValueError: no channels in or out, other spatial_dims, a backbone that is no VMamba, an unknown mixer, depths
            that do not fit the stages, weights for more blocks than the backbone has, a file that cannot be read; in
            forward, an image of another shape.
        FileNotFoundError: no such file.
        RuntimeError: the weights do not exist, or do not fit the backbone.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        backbone: str = "vmamba_small_v0",
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        pretrained: bool | str | PathLike[str] = False,
        mixer: str | Mixer = "cross",
        drop_path_rate: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_channels(in_channels, out_channels)
        require_images(spatial_dims)
        require_vmamba(backbone)
        vmamba: Any = partial(timm.create_model, backbone, in_chans=in_channels, mixer=mixer)
        encoder = vmamba(num_classes=0, drop_path_rate=drop_path_rate, depths=tuple(depths))
        decoder = vmamba(num_classes=0, drop_path_rate=drop_path_rate, depths=tuple(decoder_depths)[::-1])
        if pretrained is not False:
            whole = create_pretrained(backbone, pretrained, in_chans=in_channels, mixer=mixer)
            take_weights(encoder, whole)
            take_weights(decoder, whole)
        self.in_channels = in_channels
        self.reductions = [[reduction] * 2 for reduction in (1, 4, 8, 16, 32)]  # of the decoder's maps
        self.stem, self.stages = encoder.stem, encoder.stages  # the state dict has timm's names

        dims = [stage["num_chs"] for stage in encoder.feature_info]
        self.deepest = Stage(nn.Identity(), decoder.stages[-1].blocks)
        self.decoder = Decoder(
            spatial_dims,
            [
                WithoutSkip(PatchExpanding2d(dims[0], dims[0] // 4, 4)),
                *(
                    Up(PatchExpanding2d(coarse, dim, 2), stage.blocks)
                    for (dim, coarse), stage in zip(pairwise(dims), decoder.stages[:-1], strict=True)
                ),
            ],
            [dims[0] // 4, *dims[:-1]],
            out_channels,
            deep_supervision,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block alone for the backward pass, and compute the rest a second time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        x = pad_image(image, self.in_channels, self.reductions[-1])
        maps = [x]
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.deepest(x)
        return self.decoder(maps, list(image.shape[2:]), self.reductions)


class Up(nn.Module):
    """Expands the coarse map, adds the skip, then blocks that map (b, h, w, c) to itself."""

    def __init__(self, expand: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.expand = expand
        self.stage = Stage(nn.Identity(), blocks)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.stage(self.expand(coarse) + skip)


class PatchExpanding2d(nn.Module):
    """The opposite of patch merging: each cell becomes s x s cells; (b, c, h, w) -> (b, out, s h, s w)."""

    def __init__(self, dim: int, out: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale**2 * out, bias=False)
        self.norm = nn.LayerNorm(out, eps=1e-5)
        trunc_normal_(self.expand.weight, std=0.02)  # as the linear layers of VMamba

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x.permute(0, 2, 3, 1))
        b, h, w, _ = x.shape
        x = x.view(b, h, w, self.scale, self.scale, -1).transpose(2, 3)
        return self.norm(x.reshape(b, h * self.scale, w * self.scale, -1)).permute(0, 3, 1, 2)


def take_weights(model: nn.Module, whole: nn.Module) -> None:
    """Fills a VMamba from one with the same widths and as many blocks or more; raises ValueError if it has fewer."""
    weights, wanted = whole.state_dict(), model.state_dict().keys()
    if absent := sorted(wanted - weights.keys()):
        raise ValueError(
            f"the pretrained backbone has fewer blocks than depths or decoder_depths ask for; {len(absent)} weights "
            f"would stay random: {', '.join(absent)}"
        )
    model.load_state_dict({key: weights[key] for key in wanted})


def require_vmamba(backbone: str) -> None:
    """Raises ValueError unless the name is a VMamba's."""
    if backbone not in (known := timm.list_models(module="vmamba")):
        raise ValueError(f"unknown backbone {backbone!r}; the VMambas are {', '.join(known)}")


def require_images(spatial_dims: int) -> None:
    """Raises ValueError unless there are two axes."""
    if spatial_dims != 2:
        raise ValueError(
            f"this is a network for images, spatial_dims=2; got spatial_dims={spatial_dims}. For volumes there are "
            "SSMUNet, UMamba and SegMamba"
        )
