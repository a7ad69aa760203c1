"""Images of any size for networks that halve them again and again: pad, predict, crop."""

import torch.nn.functional as F
from torch import Tensor


def require_channels(in_channels: int, out_channels: int) -> None:
    """Raises ValueError unless a network has something to read and something to say."""
    if min(in_channels, out_channels) < 1:
        raise ValueError(
            f"in_channels and out_channels must be at least 1; got in_channels={in_channels}, "
            f"out_channels={out_channels}"
        )


def pad_image(image: Tensor, in_channels: int, reductions: list[int], least: int = 2) -> Tensor:
    """Repeats the last cells of each axis up to a multiple of its reduction.

    Args:
        image: (b, in_channels, *sizes).
        in_channels: channels that the network takes.
        reductions: cells of the image to one of the coarsest map, for each axis.
        least: cells of the coarsest map; a single one would be its own mean to an instance norm, which PyTorch refuses.

    Raises:
        ValueError: another number of axes or channels, an axis without cells, or whole numbers.
    """
    shape = list(image.shape)
    if len(shape) != len(reductions) + 2 or shape[1] != in_channels or min(shape) < 1:
        raise ValueError(
            f"the network takes images of shape (batch, {in_channels}, then {len(reductions)} sizes of at least 1); "
            f"got {shape}"
        )
    if not image.is_floating_point():
        raise ValueError(
            f"the network takes floating point numbers; got {image.dtype}. Convert the image, and scale it"
        )
    cells = [cells_of(size, reduction) for size, reduction in zip(shape[2:], reductions)]  # noqa: B905 (no strict= in a script)
    if max(cells) < least:
        cells[-1] = least
    pads: list[int] = []
    for axis in range(len(cells) - 1, -1, -1):
        pads += [0, cells[axis] * reductions[axis] - shape[axis + 2]]
    return F.pad(image, pads, mode="replicate") if max(pads) > 0 else image


def crop_map(x: Tensor, sizes: list[int], reductions: list[int]) -> Tensor:
    """The cells of a map, (b, c, *grid), that lie on an image of these sizes; each is ``reductions`` of its cells."""
    for axis, (size, reduction) in enumerate(zip(sizes, reductions)):  # noqa: B905
        x = x.narrow(axis + 2, 0, cells_of(size, reduction))
    return x


def cells_of(size: int, reduction: int) -> int:
    """Cells that cover an axis of the image, the last one in part."""
    # Not -(-size // reduction): where programs are exported to ONNX, a quotient of negative numbers is rounded up.
    return (size + reduction - 1) // reduction
