"""Keys and shapes of the published variants' state dicts in their authors' layouts, written from the fact sheets."""

import math
from collections.abc import Callable
from functools import partial

Shapes = dict[str, tuple[int, ...]]

CLASSES = 1000


def affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def dense(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def batch_norm(name: str, width: int) -> Shapes:
    running = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,), f"{name}.num_batches_tracked": ()}
    return affine(name, width) | running


def ss2d(name: str, dim: int, inner: int, state: int, *, gate: bool) -> Shapes:
    rank = math.ceil(dim / 16)
    shapes: Shapes = {
        "x_proj_weight": (4, rank + 2 * state, inner),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "A_logs": (4 * inner, state),
        "Ds": (4 * inner,),
        "in_proj.weight": ((1 + gate) * inner, dim),
        "conv2d.weight": (inner, 1, 3, 3),
        "out_proj.weight": (dim, inner),
        **affine("out_norm", inner),
    }
    if gate:
        shapes["conv2d.bias"] = (inner,)
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def patches(dim: int) -> Shapes:
    return dense("patch_embed.0", dim, 3, 4, 4) | affine("patch_embed.2", dim)


def merging(name: str, dim: int) -> Shapes:
    return affine(f"{name}.norm", 4 * dim) | {f"{name}.reduction.weight": (2 * dim, 4 * dim)}


def classifier(dim: int) -> Shapes:
    return affine("classifier.norm", dim) | dense("classifier.head", CLASSES, dim)


def vmamba(blocks: int, dim: int, expand: int) -> Shapes:
    """v2, with so many blocks in the third stage and 2 in the others."""
    shapes = dense("patch_embed.0", dim // 2, 3, 3, 3) | affine("patch_embed.2", dim // 2)
    shapes |= dense("patch_embed.5", dim, dim // 2, 3, 3) | affine("patch_embed.7", dim)
    for stage, depth in enumerate((2, 2, blocks, 2)):
        width = dim * 2**stage
        for block in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            shapes |= affine(f"{block}.norm", width) | affine(f"{block}.norm2", width)
            shapes |= ss2d(f"{block}.op", width, expand * width, 1, gate=False)
            shapes |= dense(f"{block}.mlp.fc1", 4 * width, width) | dense(f"{block}.mlp.fc2", width, 4 * width)
        if stage < 3:
            step = f"layers.{stage}.downsample"
            shapes |= dense(f"{step}.1", 2 * width, width, 3, 3) | affine(f"{step}.3", 2 * width)
    return shapes | classifier(8 * dim)


def vmamba_v0(blocks: int, dim: int) -> Shapes:
    """With so many blocks in the third stage and 2 in the others."""
    shapes = patches(dim)
    for stage, depth in enumerate((2, 2, blocks, 2)):
        width = dim * 2**stage
        for block in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            shapes |= affine(f"{block}.norm", width) | ss2d(f"{block}.op", width, 2 * width, 16, gate=True)
        if stage < 3:
            shapes |= merging(f"layers.{stage}.downsample", width)
    return shapes | classifier(8 * dim)


def efficient_vmamba(blocks: int, dim: int) -> Shapes:
    """With so many blocks in the third stage and 2 in the others."""
    shapes = patches(dim)
    for stage in (0, 1):
        width = dim * 2**stage
        for block in (f"layers.{stage}.blocks.{i}" for i in range(2)):
            shapes |= affine(f"{block}.norm", width) | ss2d(f"{block}.op", width, 2 * width, 16, gate=True)
            shapes |= dense(f"{block}.conv_branch.0", width, 1, 3, 3) | batch_norm(f"{block}.conv_branch.1", width)
            shapes |= dense(f"{block}.conv_branch.3", width, width, 1, 1) | affine(f"{block}.se.norm", width)
            shapes |= dense(f"{block}.se.global_reduce", width // 8, width)
            shapes |= dense(f"{block}.se.channel_select", width, width // 8)
        shapes |= merging(f"layers.{stage}.downsample", width)
    for stage, depth in ((2, blocks), (3, 2)):
        width = dim * 2**stage
        middle = 4 * width
        for block in (f"layers.{stage}.{i}" for i in range(1, depth + 1)):
            shapes |= {f"{block}.conv_pw.0.weight": (middle, width, 1, 1)} | batch_norm(f"{block}.conv_pw.1", middle)
            shapes |= {f"{block}.conv_dw.0.weight": (middle, 1, 3, 3)} | batch_norm(f"{block}.conv_dw.1", middle)
            shapes |= dense(f"{block}.se.conv_reduce", middle // 8, middle, 1, 1)
            shapes |= dense(f"{block}.se.conv_expand", middle, middle // 8, 1, 1)
            shapes |= {f"{block}.conv_pw2.0.weight": (width, middle, 1, 1)} | batch_norm(f"{block}.conv_pw2.1", width)
    return shapes | merging(f"layers.2.{blocks + 2}", 4 * dim) | classifier(8 * dim)


def vim(dim: int, stride: int = 16) -> Shapes:
    inner, rank, state = 2 * dim, dim // 16, 16
    cells = ((224 - 16) // stride + 1) ** 2
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, cells + 1, dim), "norm_f.weight": (dim,)}
    shapes |= dense("patch_embed.proj", dim, 3, 16, 16) | dense("head", CLASSES, dim)
    for block in (f"layers.{i}" for i in range(24)):
        mixer = f"{block}.mixer"
        shapes |= {f"{block}.norm.weight": (dim,), f"{mixer}.in_proj.weight": (2 * inner, dim)}
        shapes |= {f"{mixer}.out_proj.weight": (dim, inner)}
        for back, names in (("", ("A_log", "D")), ("_b", ("A_b_log", "D_b"))):
            shapes |= {f"{mixer}.{names[0]}": (inner, state), f"{mixer}.{names[1]}": (inner,)}
            shapes |= dense(f"{mixer}.conv1d{back}", inner, 1, 4) | dense(f"{mixer}.dt_proj{back}", inner, rank)
            shapes |= {f"{mixer}.x_proj{back}.weight": (rank + 2 * state, inner)}
    return shapes


PUBLISHED: dict[str, Callable[[], Shapes]] = {
    "vmamba_tiny": partial(vmamba, 8, 96, 1),
    "vmamba_tiny_s2l5": partial(vmamba, 5, 96, 2),
    "vmamba_small": partial(vmamba, 15, 96, 2),
    "vmamba_small_s1l20": partial(vmamba, 20, 96, 1),
    "vmamba_base": partial(vmamba, 15, 128, 2),
    "vmamba_base_s1l20": partial(vmamba, 20, 128, 1),
    "vmamba_tiny_v0": partial(vmamba_v0, 9, 96),
    "vmamba_small_v0": partial(vmamba_v0, 27, 96),
    "vmamba_base_v0": partial(vmamba_v0, 27, 128),
    "efficient_vmamba_tiny": partial(efficient_vmamba, 4, 48),
    "efficient_vmamba_small": partial(efficient_vmamba, 4, 64),
    "efficient_vmamba_base": partial(efficient_vmamba, 9, 96),
    "vim_tiny": partial(vim, 192),
    "vim_tiny_stride8": partial(vim, 192, 8),
    "vim_small": partial(vim, 384),
    "vim_small_stride8": partial(vim, 384, 8),
    "vim_base": partial(vim, 768),
}
