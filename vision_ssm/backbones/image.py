"""The convolution that reads the image: what a backbone does not take is one clear error."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from vision_ssm.layers.convolution import Conv2d

__all__ = ["ImageConv2d"]


@register_notrace_module
class ImageConv2d(Conv2d):
    """``nn.Conv2d`` that checks the image first, unless it is being compiled, exported, traced or scripted.

    Raises:
        ValueError: in forward, an image of other axes, channels or dtype, or smaller than the kernel.
    """

    def forward(self, image: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            self.check(image)
        return self.convolve(image)

    @torch.jit.ignore
    def check(self, image: Tensor) -> None:
        """Raises ValueError unless the image (b, k, h, w) is one that this convolution reads."""
        padding = (0, 0) if isinstance(self.padding, str) else self.padding
        rows, columns = (max(size - 2 * pad, 1) for size, pad in zip(self.kernel_size, padding, strict=True))
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[0] < 1 or shape[1] != self.in_channels or shape[2] < rows or shape[3] < columns:
            raise ValueError(
                f"image must have shape (batch, {self.in_channels}, height, width) with a batch of at least 1 and at "
                f"least {rows} x {columns} cells; got {shape}"
            )
        if image.dtype != self.weight.dtype and not torch.is_autocast_enabled(image.device.type):
            raise ValueError(
                f"image is {image.dtype}, the weights are {self.weight.dtype}; convert one of them, or use autocast"
            )
