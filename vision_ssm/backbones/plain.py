"""The shell of plain backbones: patches, blocks on their tokens, norm, pooling, classifier; one scale throughout."""

# Shapes: b batch, c channels, h w grid of patches, l tokens.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_ssm.model_zoo.checkpoints import to_ours

from .image import ImageConv2d

__all__ = ["Plain"]


class Plain(nn.Module):
    """Patches row by row, blocks, norm, pooling, classifier. A subclass may add tokens in ``tokens`` and ``take``.

    Args:
        blocks: maps of (b, l, c) to itself.
        norm: the norm after the last block.
        dim: channels.
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg" for the mean of the patches, "token" for the class token if there is one, "" for all tokens.
        patch_size: side of a patch.
        stride: step between patches.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: the pooling is unknown, or there is no class token to take.
    """

    pools: tuple[str, ...] = ("avg", "")
    skipped_by_weight_decay: tuple[str, ...] = (".A_log", ".D", ".dt_bias")

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        dim: int,
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        patch_size: int,
        stride: int,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans  # timm saves it with the weights
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [{"num_chs": dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(len(blocks))]
        self.grad_checkpointing = False
        self.global_pool = self._pooling(global_pool)
        self.patch_embed = ImageConv2d(in_chans, dim, patch_size, stride=stride)
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        lecun_normal_(self.patch_embed.weight)
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        self.head = self._classifier(num_classes)

    def _classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        like = self.patch_embed.weight
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def _pooling(self, name: str) -> str:
        if name not in self.pools:
            raise ValueError(f"global_pool must be one of {self.pools}; got {name!r}")
        return name

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; the official layout is converted, so that timm's ``checkpoint_path`` accepts it."""
        return super().load_state_dict(to_ours(state_dict), strict=strict, assign=assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(self.skipped_by_weight_decay)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier with ``num_classes`` outputs; 0 for none, ``global_pool=""`` for tokens."""
        if global_pool is not None:
            self.global_pool = self._pooling(global_pool)
        self.num_classes = num_classes
        self.head = self._classifier(num_classes).train(self.training)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens of an image, (b, l, c)."""
        return self.tokens(self.patch_embed(x))

    def tokens(self, patches: Tensor) -> Tensor:
        """Tokens of a map of patches, (b, c, h, w) -> (b, l, c)."""
        return patches.flatten(2).transpose(1, 2)

    def take(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token, (b, 1, c), if there is one, and the patches."""
        return None, tokens

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stream after the blocks ``indices`` (all by default; the last n for an int), and the final tokens.

        Args:
            x: image, (b, in_chans, H, W).
            indices: blocks to return.
            return_prefix_tokens: return (patches, class token or None) for each block; a script does not.
            norm: apply the final norm to what is returned.
            stop_early: stop after the last block wanted; the final norm follows the last of all blocks alone.
            output_fmt: "NCHW" for patches as maps (b, c, h, w), "NLC" for (b, h w, c).
            intermediates_only: return the list alone.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got '{output_fmt}'")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x = self.patch_embed(x)
        height, width = x.shape[-2:]
        x = self.tokens(x)
        found: list[Tensor] = []
        prefixes: list[Tensor | None] = []
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108, a script knows no conditional module
            blocks = self.blocks
        else:
            blocks = self.blocks[: last + 1]
        for i, block in enumerate(blocks):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if i in wanted:
                cls, patches = self.take(self.norm(x) if norm else x)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, (height, width))
                found.append(patches)
                prefixes.append(cls)
        if return_prefix_tokens and not torch.jit.is_scripting():
            pairs: list[Any] = list(zip(found, prefixes, strict=True))
            found = pairs
        if intermediates_only:
            return found
        return (self.norm(x) if len(blocks) == len(self.blocks) else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the blocks ``indices`` do not need; returns them."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, (b, l, c)."""
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool != "":
            cls, patches = self.take(x)
            x = cls[:, 0] if cls is not None and self.global_pool == "token" else patches.mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
