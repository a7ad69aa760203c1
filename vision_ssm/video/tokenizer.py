"""Frames as maps of integers, and back: what a tokenizer is, and one that is trained here.

van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, arXiv:1711.00937: straight-through
gradients, a codebook of moving averages (appendix A.1), and the commitment loss. That codes which are hardly used start
anew, and where, is ours.
"""

# Shapes: b clips, t frames, k channels of a frame, h rows, w columns of pixels; h' and w' of codes; e numbers of a
# vector, m vectors.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.video.next_frame import check_frames, check_widths, frame_decoder, frame_encoder


class Tokenizer(nn.Module, ABC):
    """Turns frames into codes and back, each frame by itself. Subclass it around any other.

    Attributes:
        channels: channels k of a frame.
        codes: how many there are; a code is an integer from 0 to ``codes`` - 1.
        stride: rows, and columns, of pixels to one of codes.
    """

    channels: int
    codes: int
    stride: int

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (b, t, k, h, w) with values in [-1, 1] -> codes (b, t, h / stride, w / stride), int64."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (b, t, h', w') -> frames (b, t, k, h' * stride, w' * stride) with values in [-1, 1]."""


class Codebook(nn.Module):
    """Vectors that stand for those near them, of which they are moving averages.

    A code that is hardly used starts anew from a vector that is represented badly: drawn among those at hand by its
    squared error. So do all at the first batch. Processes that train together average over all their vectors.

    Args:
        codes: how many.
        size: numbers e of a vector.
        decay: share of the averages that one batch leaves.
        least: how often a code must be used to stay, as a share of the mean.

    Shapes: codes (...) -> their vectors (..., e).
    """

    vectors: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, codes: int, size: int, *, decay: float = 0.99, least: float = 0.1) -> None:
        super().__init__()
        self.decay, self.least = decay, least
        self.register_buffer("vectors", torch.randn(codes, size))
        self.register_buffer("usage", torch.zeros(codes))  # share of all vectors that take the code
        self.register_buffer("sums", torch.zeros(codes, size))

    def forward(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.vectors)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes (m,) of the vectors nearest to z (m, e)."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.vectors.dtype)
            return (self.vectors.square().sum(dim=1) - 2 * z @ self.vectors.T).argmin(dim=1)

    @torch.no_grad()
    def learn(self, z: Tensor, codes: Tensor) -> None:
        """Moves each vector towards those of z (m, e) whose code (m,) it is."""
        z, total = z.to(self.vectors.dtype), len(self.vectors)
        error = (z - self(codes)).square().sum(dim=1) + torch.finfo(z.dtype).tiny
        fresh = z[torch.multinomial(error, total, replacement=True)]
        taken = (codes[:, None] == torch.arange(total, device=z.device)).to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):  # and no index_add_, which varies on a GPU
            usage, sums = taken.mean(dim=0), taken.T @ z / len(z)
        if dist.is_available() and dist.is_initialized():
            for mean in (usage, sums):
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            dist.broadcast(fresh, src=0)
        new = ~self.usage.any()
        self.usage.lerp_(usage, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = new | (self.usage < self.least / total)
        weight = 2 * self.least / total  # so little that it soon moves to its vectors, or dies again
        self.usage.masked_fill_(dead, weight)
        self.sums.copy_(torch.where(dead[:, None], fresh * weight, self.sums))
        self.vectors.copy_(self.sums / self.usage[:, None])


class Reconstruction(NamedTuple):
    """Frames through their codes.

    Attributes:
        frames: as decoded, (b, t, k, h, w).
        codes: (b, t, h', w').
        commitment: mean squared distance of the encoder's vectors to their codes', ().
    """

    frames: Tensor
    codes: Tensor
    commitment: Tensor


class VQAutoencoder(Tokenizer):
    """The encoder and decoder of :class:`NextFrame` with a codebook between.

    Args:
        channels: channels k of a frame.
        codes: vectors in the codebook.
        size: numbers e of each.
        encoder: widths of the encoder; every one after the first halves the map.
        decoder: widths of the decoder, in the encoder's order.
        units: residual units at each width.
        decay: of the codebook's averages, from 0 to 1.

    Shapes: frames (b, t, k, h, w) with values in [-1, 1] -> a :class:`Reconstruction`.

    Raises:
        ValueError: sizes that do not fit, frames or codes out of shape, a code out of range.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        codes: int = 512,
        size: int = 64,
        encoder: Sequence[int] = (64, 128, 256),
        decoder: Sequence[int] = (64, 128, 256),
        units: int = 1,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        check_widths(encoder, decoder)
        if min(channels, codes, size, units) < 1 or not 0 <= decay < 1:
            raise ValueError(
                "channels, codes, size and units must be at least 1 and decay from 0 to below 1; "
                f"got channels={channels}, codes={codes}, size={size}, units={units}, decay={decay}"
            )
        self.channels, self.codes, self.stride = channels, codes, 2 ** (len(encoder) - 1)
        self.encoder = nn.Sequential(*frame_encoder(channels, encoder, units), nn.Conv2d(encoder[-1], size, 1))
        self.codebook = Codebook(codes, size, decay=decay)
        self.decoder = nn.Sequential(*frame_decoder(size, decoder, units, channels), nn.Tanh())

    def forward(self, frames: Tensor) -> Reconstruction:
        check_frames(frames, self.channels, self.stride)
        clips = frames.shape[:2]
        z = self.encoder(frames.flatten(0, 1)).movedim(1, -1)
        rows = z.detach().flatten(0, 2)
        codes = self.codebook.nearest(rows)
        taken = self.codebook(codes).view(z.shape)
        if self.training:
            self.codebook.learn(rows, codes)
        through = z + (taken.to(z.dtype) - z).detach()
        decoded = self.decoder(through.movedim(-1, 1)).unflatten(0, clips)
        return Reconstruction(decoded, codes.view(*clips, *z.shape[1:3]), F.mse_loss(z.float(), taken.float()))

    def encode(self, frames: Tensor) -> Tensor:
        check_frames(frames, self.channels, self.stride)
        z = self.encoder(frames.flatten(0, 1)).movedim(1, -1)
        return self.codebook.nearest(z.flatten(0, 2)).view(*frames.shape[:2], *z.shape[1:3])

    def decode(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.codes)
        maps = self.codebook(codes).flatten(0, 1)
        return self.decoder(maps.movedim(-1, 1)).unflatten(0, codes.shape[:2])


def check_codes(codes: Tensor, total: int, *, least: int = 0) -> None:
    """Raises ValueError unless clips of codes (b, t, h, w) are integers from ``least`` to ``total`` - 1."""
    if codes.dtype not in (torch.int64, torch.int32) or codes.ndim != 4 or 0 in codes.shape:
        raise ValueError(
            "codes must be integers of shape (clips, frames, height, width) and not empty; "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )
    if not torch.compiler.is_compiling() and ((codes < least) | (codes >= total)).any():
        raise ValueError(
            f"codes go from {least} to {total - 1}; got {int(codes.min())} to {int(codes.max())}. "
            "Are they another tokenizer's?"
        )
