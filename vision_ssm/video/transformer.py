"""A causal Transformer over frames, which ConvS5 is compared with.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, with norms first. A token is a patch of a
map; it sees all tokens of its own frame and of those before.
"""

# Shapes: t frames, b clips, h rows, w columns, c channels, l tokens of a frame, e width of a token, s heads.

import math
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, build_sincos2d_pos_embed
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.layers.over_time import EPS, State, check_clip


def place_in_time(first: int, frames: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of the places of frames in a clip: (frames, width), as in section 3.5."""
    place = torch.arange(first, first + frames, device=device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(1e4) / width))
    angle = torch.outer(place, rate)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); x (b, n, e) follows the keys and values (2, b, s, m, e / s)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, past: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        q, *kv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        now = torch.stack(kv)
        known = now if past is None else torch.cat([past.to(now.dtype), now], dim=3)
        mixed = F.scaled_dot_product_attention(q, known[0], known[1], attn_mask=seen)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), known


class FrameTransformer(nn.Module):
    """Attention over all patches of all frames so far.

    Its state grows with the clip: keys and values of every block with ``cache``, and else the frames themselves, all of
    which are computed again for each new one.

    Args:
        dim: channels c in and out.
        width: width e of a token, a multiple of 4 and of ``heads``.
        heads: heads s of the attention.
        layers: blocks.
        patch: rows and columns of the map in a token.
        cache: remember keys and values.

    Shapes: u (t, b, h, w, c) and a state or none -> (t, b, h, w, c) and the state with these frames: a tensor
    (2, b, s, t, h / patch, w / patch, e / s) for each block, or the one of the frames, (t, b, h, w, c).

    Raises:
        ValueError: sizes that do not fit, or resets: a row holds one clip.
    """

    def __init__(
        self, dim: int, *, width: int = 512, heads: int = 8, layers: int = 8, patch: int = 4, cache: bool = True
    ) -> None:
        super().__init__()
        if min(dim, width, heads, layers, patch) < 1:
            raise ValueError(
                "dim, width, heads, layers and patch must be at least 1; "
                f"got dim={dim}, width={width}, heads={heads}, layers={layers}, patch={patch}"
            )
        if width % 4 or width % heads:
            raise ValueError(f"width must be a multiple of 4 and of heads; got width={width}, heads={heads}")
        self.dim, self.heads, self.patch, self.cache = dim, heads, patch, cache
        self.inward = nn.Linear(dim * patch**2, width)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.outward = nn.Linear(width, dim * patch**2)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of each block, keep only what enters for the backward pass, and compute the rest a second time."""
        self.grad_checkpointing = enable

    def forward(self, u: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        _, clips, height, width = check_clip(u, self.dim)
        if reset is not None:
            raise ValueError("a Transformer takes one clip in a row and no resets; give each clip a row of its own")
        if height % self.patch or width % self.patch:
            raise ValueError(f"height and width must be multiples of the patch {self.patch}; got {(height, width)}")
        if not self.cache:
            if state is not None and (len(state) != 1 or state[0].shape[1:] != u.shape[1:]):
                raise ValueError(f"the state must be the frames so far, (t, {', '.join(map(str, u.shape[1:]))})")
            whole = u if state is None else torch.cat([state[0], u])
            return self.attend(whole, (None,) * len(self.blocks))[0][-len(u) :], (whole,)
        if state is None:
            return self.attend(u, (None,) * len(self.blocks))
        grid = (height // self.patch, width // self.patch)
        kept = (2, clips, self.heads, *grid, self.inward.out_features // self.heads)
        fits = (m.ndim == 7 and (*m.shape[:3], *m.shape[4:]) == kept for m in state)
        if len(state) != len(self.blocks) or not all(fits):
            raise ValueError(
                f"the state must be {len(self.blocks)} tensors (2, {clips}, {self.heads}, frames, "
                f"{', '.join(map(str, kept[3:]))}); "
                f"got {[tuple(m.shape) for m in state]}. Is it another model's?"
            )
        return self.attend(u, state)

    def attend(self, u: Tensor, past: tuple[Tensor | None, ...]) -> tuple[Tensor, State]:
        """Outputs of frames, (t, b, h, w, c), that follow the keys and values of each block."""
        frames, clips, height, width, _ = u.shape
        grid = (height // self.patch, width // self.patch)
        tokens = grid[0] * grid[1]
        before = 0 if past[0] is None else past[0].shape[3]
        patches = u.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).permute(1, 0, 2, 4, 3, 5, 6)
        x = self.inward(patches.flatten(4).flatten(2, 3))
        size = x.shape[-1]
        x = x + build_sincos2d_pos_embed([*grid], size, device=u.device).to(x.dtype)
        x = x + place_in_time(before, frames, size, u.device).to(x.dtype)[:, None]
        x = x.flatten(1, 2)
        seen = None
        if frames > 1:  # the last frame sees everything
            place = torch.arange(before + frames, device=u.device).repeat_interleave(tokens)
            seen = place[-frames * tokens :, None] >= place
        known = []
        for block, keys in zip(self.blocks, past, strict=True):
            kept = None if keys is None else keys.flatten(3, 5)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, now = checkpoint(block, x, kept, seen)
            else:
                x, now = block(x, kept, seen)
            known.append(now.unflatten(3, (-1, *grid)))
        y = self.outward(self.norm(x)).view(clips, frames, *grid, self.patch, self.patch, self.dim)
        return cast(Tensor, y.permute(1, 0, 2, 4, 3, 5, 6).reshape(u.shape)), tuple(known)
