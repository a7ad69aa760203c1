"""The short convolution along a list of tokens, a channel at a time, that stands before most scans."""

# Shapes: b batch, l tokens, c channels.

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from .convolution import Conv1d

__all__ = ["TokenConvolution"]


@register_notrace_module
class TokenConvolution(Conv1d):
    """``nn.Conv1d`` with a filter for each channel, of tokens as they lie: (b, l, c) -> (b, l, c).

    PyTorch's convolution wants each channel's tokens in a row. Compiled, this one is a sum of shifted lists, which the
    compiler makes part of what comes before and after: nothing is laid out anew, and nothing depends on the length.

    Args:
        channels: c.
        before: zeros before the first token, which so many taps of a filter of ``before + 1 + after`` look back on.
        after: zeros behind the last token.
    """

    def __init__(self, channels: int, *, before: int, after: int) -> None:
        super().__init__(channels, channels, before + 1 + after, groups=channels)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and _is_compiled():
            return self.shifted(x)
        x = F.pad(x.transpose(1, 2), (self.before, self.after))
        return self._conv_forward(x, self.weight, self.bias).transpose(1, 2)

    def shifted(self, x: Tensor) -> Tensor:
        """The same without a convolution."""
        length, dtype = x.shape[1], x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = F.pad(x, (0, 0, self.before, self.after))
        assert self.bias is not None
        y = self.bias
        for tap, weight in enumerate(self.weight.squeeze(1).unbind(1)):
            y = y + weight * x[:, tap : tap + length]
        return y.to(dtype)


@torch.jit.unused
def _is_compiled() -> bool:
    """Exported programs keep the convolution, which runtimes have a kernel for; torch 2.6 cannot tell them apart."""
    exported = hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not exported
