"""Random variants of a batch, made at once where the batch is: on the CPU or on the GPU."""
# Shapes: b batch, c channels, h w the slice.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RandomAffine", "RandomIntensity"]


class RandomAffine(nn.Module):
    """Moves, turns, scales and mirrors every image of a batch, and its label alike; edges are repeated outwards.

    Args:
        shift: largest shift along h and w, in pixels.
        rotate: largest angle, in radians.
        scale: largest relative change of size.
        mirror: probability of a flip along h.

    Shapes: image (b, c, h, w) interpolated, label (b, 1, h, w) nearest; both keep their shape.
    """

    def __init__(self, *, shift: tuple[float, float], rotate: float, scale: float, mirror: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.rotate = rotate
        self.scale = scale
        self.mirror = mirror

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.sample(len(image), image.shape[-2:]).to(image)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return moved, F.grid_sample(label, grid, mode="nearest", padding_mode="border", align_corners=False)

    def sample(self, batch: int, size: torch.Size) -> Tensor:
        """Random maps from output to input in the coordinates of ``affine_grid``: (b, 2, 3)."""
        height, width = size
        angle = uniform(batch) * self.rotate
        zoom = 1 + uniform(batch) * self.scale
        flip = torch.where(torch.rand(batch) < self.mirror, -1.0, 1.0)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        to_w = torch.stack((cos, -sin * height / width * flip, uniform(batch) * 2 * self.shift[1] / width), dim=1)
        to_h = torch.stack((sin * width / height, cos * flip, uniform(batch) * 2 * self.shift[0] / height), dim=1)
        return torch.stack((to_w, to_h), dim=1)


class RandomIntensity(nn.Module):
    """Scales and shifts the intensities of every image of a batch: x -> x (1 + gain) + offset.

    Args:
        gain: largest relative change.
        offset: largest shift, in the image's unit.
    """

    def __init__(self, *, gain: float, offset: float) -> None:
        super().__init__()
        self.gain = gain
        self.offset = offset

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        gain, offset = (uniform(len(image))[:, None, None, None].to(image) for _ in range(2))
        return image * (1 + gain * self.gain) + offset * self.offset, label


def uniform(batch: int) -> Tensor:
    """Numbers in [-1, 1): (b,). Drawn on the CPU, so that one seed gives one run on every device."""
    return torch.rand(batch) * 2 - 1
