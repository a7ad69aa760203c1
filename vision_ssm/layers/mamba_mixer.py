"""MambaMixer's block: tokens and channels are selected in turn, each on a learned average of what came before.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888. No code was released.
"""

# Shapes: b batch, h w grid, l = h w cells, c channels.

import torch
from torch import Tensor, nn

from .channel_mixer import ChannelMixer, WeightedAverage
from .mixers import Mixer
from .ss import SS2D


class Normed(nn.Module):
    """mixer(norm(x)); x itself for samples that stochastic depth spares the mixer. (b, l, c) -> (b, l, c).

    There is no residual around a mixer here, so that a dropped output must not be 0. The mixer takes the cells as a
    map of ``height`` and ``width``; elsewhere they are a list, for the reason that ``SS`` gives.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.rate = drop_path

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.mixer(self.norm(x).unflatten(1, [height, width])).flatten(1, -2)
        if self.training and self.rate > 0:
            spared = torch.rand([x.shape[0], 1, 1], device=x.device) < self.rate
            y = torch.where(spared, x, y)
        return y


class MambaMixerBlock(nn.Module):
    """Two token mixers and a channel mixer, on averages of all that came before them in a stack of blocks.

    With y_0 the input of the stack, block l computes (equations 13 to 16)::

        y_token(l) = tokens(Σ_{i<l} α_i y_token(i) + β_i y_channel(i)),
        y_channel(l) = channels(Σ_{i<=l} θ_i y_token(i) + Σ_{i<l} γ_i y_channel(i))

    Args:
        dim: channels c in and out.
        index: how many blocks of the stack come before.
        channel_expand: inner channels of the channel mixer as a multiple of ``dim``.
        state: size n of the states.
        mixer: what mixes the cells; a name in ``vision_ssm.layers.MIXERS``.
        channel_scan: what a channel is to the scan along channels; a name in
            ``vision_ssm.layers.channel_mixer.CHANNEL_SCANS``.
        drop_path: share of samples that each mixer spares in training.

    Shapes: a list of (b, l, c), the input, then token and channel output of each block in turn, to one of two more.

    Raises:
        ValueError: unknown mixer or channel scan.
    """

    def __init__(
        self,
        dim: int,
        *,
        index: int = 0,
        channel_expand: float = 2.0,
        state: int = 16,
        mixer: str | Mixer = "cross",
        channel_scan: str = "cell",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        count = 2 * index + 1
        tokens = (SS2D(dim, state=state, expand=2.0, mixer=mixer, gate=True, conv_bias=True) for _ in range(2))
        channels = ChannelMixer(dim, int(channel_expand * dim), state=state, scan=channel_scan)
        self.to_tokens = WeightedAverage(count, newest=(count - 1, count - 2) if index else (0,))
        self.tokens = nn.ModuleList(Normed(dim, layer, drop_path=drop_path) for layer in tokens)
        self.to_channels = WeightedAverage(count + 1, newest=(count, count - 1))
        self.channels = Normed(dim, channels, drop_path=drop_path)

    def forward(self, outputs: list[Tensor], height: int, width: int) -> list[Tensor]:
        outputs = outputs.copy()
        y = self.to_tokens(outputs)
        for mixer in self.tokens:
            y = mixer(y, height, width)
        outputs.append(y)
        outputs.append(self.channels(self.to_channels(outputs), height, width))
        return outputs
