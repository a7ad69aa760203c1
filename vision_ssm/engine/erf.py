"""The effective receptive field: how much each pixel moves the centre of a network's last feature map.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
arXiv:1701.04128. Areas are told as by Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, arXiv:2203.06717.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, repeat
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from vision_ssm.engine.benchmark.jobs import create
from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.model_zoo import checkpoints

__all__ = ["PARTS", "Field", "average", "initial", "outputs", "pictures", "receptive_fields", "trained", "write_areas"]

PARTS = (0.2, 0.5, 0.99)
"""Parts of the total whose areas are told."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """An effective receptive field.

    Attributes:
        shares: of each pixel in the absolute gradient, (h, w); they add up to 1.
        samples: gradients that were averaged.
    """

    shares: np.ndarray
    samples: int

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Row and column, in pixels, of the centre of gravity: padded strides move it off the middle of the image."""
        rows, columns = (np.arange(size) + 0.5 for size in self.shares.shape)
        return float(self.shares.sum(1) @ rows), float(self.shares.sum(0) @ columns)

    @cached_property
    def distances(self) -> np.ndarray:
        """Half the side of the square about the centre that each pixel's middle is on, (h, w)."""
        rows, columns = (
            np.abs(np.arange(size) + 0.5 - middle) for size, middle in zip(self.shares.shape, self.centre, strict=True)
        )
        return np.maximum(rows[:, None], columns[None, :]).round(6)  # a square, whatever the centre was rounded to

    def radius(self, part: float) -> float:
        """Half the side of the smallest square about the centre that holds ``part`` of the total."""
        order = np.argsort(self.distances, axis=None, kind="stable")
        held = np.cumsum(self.shares.ravel()[order])
        return float(self.distances.ravel()[order[np.searchsorted(held, part * held[-1])]])

    def area(self, part: float) -> float:
        """Part of the image that this square covers; what lies beyond a border does not count."""
        return float((self.distances <= self.radius(part)).mean())

    def areas(self) -> dict[str, float]:
        """The area for each of ``PARTS``."""
        return {f"{part:.0%}": self.area(part) for part in PARTS}


def pictures(source: Path, name: str, *, size: int, most: int) -> list[Tensor]:
    """Pictures as the timm model ``name`` takes them, each (3, size, size).

    Args:
        source: a picture, or a folder of them.
        name: whose mean, deviation and interpolation are used.
        size: side in pixels; the shorter side is resized to it, the longer one is cropped.
        most: so many of a folder's pictures at most, the first by their names.

    Raises:
        FileNotFoundError: there is no such file, or no picture in the folder.
        ValueError: a file is no picture, or broken; ``size`` or ``most`` is below 1.
    """
    if size < 1 or most < 1:
        raise ValueError(f"size and samples must be at least 1; got size {size} and {most} samples")
    if not source.exists():
        raise FileNotFoundError(f"no such picture or folder: {source}")
    files = [source]
    if source.is_dir():
        known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in known)
    if not files:
        raise FileNotFoundError(f"no picture in {source}; files such as .jpg and .png are read, not folders inside it")
    config = timm.get_pretrained_cfg(name)
    options = resolve_data_config(
        {"input_size": (3, size, size), "crop_pct": 1.0}, pretrained_cfg=config.to_dict() if config else None
    )
    transform = create_transform(**options)
    return [transform(_opened(file)) for file in files[:most]]


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read as a picture ({error}); give a whole .jpg, .png or the like"
        ) from error


def initial(name: str, images: Sequence[Tensor], samples: int, device: torch.device) -> Field:
    """Of a timm model before training: each sample is another initialisation, with the next image."""
    return average((create(name, images[0].shape[-1]) for _ in range(samples)), images, device)


def trained(name: str, images: Sequence[Tensor], samples: int, device: torch.device, checkpoint: Path) -> Field:
    """Of a timm model with the weights of a checkpoint, which must fit: each sample is the next image.

    Raises:
        FileNotFoundError, ValueError: see :func:`vision_ssm.model_zoo.load`.
    """
    state = checkpoints.to_ours(checkpoints.read(checkpoint))
    network = create(name, images[0].shape[-1], num_classes=checkpoints.classes(state, name))
    return average(repeat(checkpoints.load(network, state), samples), images, device)


def average(networks: Iterable[nn.Module], images: Sequence[Tensor], device: torch.device) -> Field:
    """The field averaged over ``networks``, each of which sees one of the images in turn.

    Channels are added up with random signs, so that on average none cancels another: a normalised map's channels add
    up to a constant, which has no gradient.

    Raises:
        ValueError: a network has no feature maps, or a gradient that vanishes or is not finite.
    """
    shares: list[Tensor] = []
    for network, image in zip(networks, cycle(images), strict=False):
        pixels = image[None].to(device).requires_grad_()
        last = _last_map(network.to(device).eval().requires_grad_(False), pixels)
        height, width = last.shape[2:]
        signs = torch.randint(2, last.shape[1:2]).to(last) * 2 - 1
        (gradient,) = torch.autograd.grad((last[0, :, height // 2, width // 2] * signs).sum(), pixels)
        share = gradient[0].abs().sum(0).double().cpu()
        if not 0 < share.sum() < torch.inf:
            raise ValueError(f"the gradient of {type(network).__name__} by its input is zero or not finite")
        shares.append(share / share.sum())
    return Field(shares=torch.stack(shares).mean(0).numpy(), samples=len(shares))


def _last_map(network: nn.Module, pixels: Tensor) -> Tensor:
    """The map after the last stage or block, before the final norm, (1, c, h, w)."""
    intermediates = getattr(network, "forward_intermediates", None)
    if intermediates is None:
        raise ValueError(f"{type(network).__name__} has no forward_intermediates, which timm's image models have")
    return intermediates(pixels, indices=1, intermediates_only=True)[-1]


def outputs(picture: Path, *, overwrite: bool) -> tuple[Path, Path]:
    """The picture and the JSON file beside it.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: one is there already, the folder is not, or it is no .png.
    """
    if picture.suffix.lower() != ".png":
        raise ValueError(f"the picture is written as PNG; got {picture}. Give a name that ends in .png")
    if not picture.parent.is_dir():
        raise FileNotFoundError(f"cannot write {picture}: there is no folder {picture.parent}")
    both = picture, picture.with_suffix(".json")
    if found := [str(path) for path in both if path.exists() and not overwrite]:
        raise FileExistsError(f"{' and '.join(found)} would be replaced; give another --out, or --overwrite")
    return both


def write_areas(path: Path, fields: Mapping[str, Field], about: Mapping[str, str | int | None]) -> None:
    """Writes ``about`` and the areas of each field as JSON, whole."""
    measured = {title: {"samples": field.samples, "areas": field.areas()} for title, field in fields.items()}
    text = json.dumps({**about, "fields": measured}, indent=2, ensure_ascii=False)
    write_atomically(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def receptive_fields(fields: Mapping[str, Field], title: str) -> Figure:
    """Each field on a logarithmic scale relative to its strongest pixel, with the squares that ``areas`` measures."""
    figure = Figure(figsize=(4.4 * len(fields) + 1, 4.8), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    scale = LogNorm(1e-6, 1, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        relative = field.shares / field.shares.max()
        height, width = relative.shape
        drawn = axes.imshow(relative, norm=scale, cmap="viridis", extent=(0, width, height, 0), interpolation="nearest")
        row, column = field.centre
        for part in PARTS:
            half = field.radius(part) + 0.5  # to the edge of the pixels
            square = Rectangle(
                (column - half, row - half), 2 * half, 2 * half, fill=False, color="white", linewidth=0.8
            )
            axes.add_patch(square)
        areas = ", ".join(f"{part} in {area:.1%}" for part, area in field.areas().items())
        axes.set_title(f"{name}, mean of {field.samples}\n{areas} of the area", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(drawn, ax=panels, label="gradient, relative to the strongest pixel", extend="min")
    figure.suptitle(title)
    return figure
