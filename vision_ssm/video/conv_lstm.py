"""ConvLSTM, the recurrence that ConvS5 is compared with.

Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
arXiv:1506.04214, without peepholes. Layers have the skip and the norm of ConvS5's, so that they stack as deep.
"""

# Shapes: t frames, b clips, h rows, w columns, c channels.

import torch
from torch import Tensor, nn

from vision_ssm.layers.convs5 import check_reset
from vision_ssm.layers.over_time import EPS, check_clip


class ConvLSTM(nn.Module):
    """norm(u + LSTM(u)) with convolutions for matrices.

    The inputs of all frames are convolved at once, for all four gates; only the states go frame by frame.

    Args:
        dim: channels c in and out, and of the state.
        kernel: size of both convolutions, odd.

    Shapes: u (t, b, h, w, c), state (2, b, c, h, w) of output and cell or none for zeros, and reset (t, b), true where
    a new clip begins in the row -> (t, b, h, w, c) and the last state.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(self, dim: int, *, kernel: int = 3) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that maps keep their size; got {kernel}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        self.dim = dim
        self.inward = nn.Conv2d(dim, 4 * dim, kernel, padding=kernel // 2)
        self.across = nn.Conv2d(dim, 4 * dim, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        bias = torch.zeros(4 * dim)
        bias[dim : 2 * dim] = 1  # of the gates that keep the cell: a new layer remembers
        self.inward.bias = nn.Parameter(bias)

    def forward(self, u: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames, clips, height, width = check_clip(u, self.dim)
        check_reset(reset, frames, clips)
        shape = (2, clips, self.dim, height, width)
        if state is not None and tuple(state.shape) != shape:
            raise ValueError(f"the state must have shape {shape}; got {tuple(state.shape)}. Is it another model's?")
        h, cell = u.new_zeros(shape) if state is None else state
        inward = self.inward(u.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, (frames, clips))
        found = []
        for t, entering in enumerate(inward):
            if reset is not None:
                h, cell = (m.masked_fill(reset[t].view(-1, 1, 1, 1), 0) for m in (h, cell))
            h, cell = self.advance(entering.movedim(-1, 1) + self.across(h), cell)
            found.append(h.movedim(1, -1))  # as u is laid out: gathering them moves no channel
        return self.norm(u + torch.stack(found)), torch.stack([h.to(cell.dtype), cell])

    @staticmethod
    def advance(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """What the gates (b, 4 c, h, w) make of the cell (b, c, h, w): the output and the next cell."""
        enter, keep, show, new = gates.chunk(4, dim=1)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(show) * torch.tanh(cell), cell
