"""A trained network that labels volumes as they lie in their files."""
# Shapes: b batch, c channels or classes, x y z the grid of a file.

import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from torch import Tensor, nn

from vision_ssm._version import __version__
from vision_ssm.data.dicom import read_series
from vision_ssm.data.volumes import prepared
from vision_ssm.engine.config import build, config_name, settings
from vision_ssm.engine.segmentation.cases import Case, Modalities
from vision_ssm.engine.segmentation.overlays import Shown, upright
from vision_ssm.engine.segmentation.volumes import COLUMNS, volumes
from vision_ssm.engine.training.device import device

__all__ = ["Labelled", "Predictor", "first_channel", "flip_sets", "mark_of", "most_probable"]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What a network says of a case.

    Attributes:
        source: the image on whose grid the labels lie, as nibabel reads it.
        probabilities: of background and classes, (c, x, y, z), or (c, x, y, z, t) of a cine.
        labels: the most probable class in each place, without c.
        shown: title -> image and labels, for a figure.
    """

    source: Any
    probabilities: np.ndarray
    labels: np.ndarray
    shown: Mapping[str, Shown]


class Predictor:
    """A trained network that gives every voxel of a file its probabilities.

    Attributes:
        columns: of the table of volumes.
        mark: stands for all that a label map depends on beside its image.

    Args:
        config: one that segments volumes.
        task: built from it, with trained weights, in evaluation mode.
        flips: axes of the prepared volume, such as "xy"; probabilities are averaged over all flips along them.

    Raises:
        ValueError: the config has no ``prepare``, so it does not segment volumes, or an axis is none of x, y and z.
    """

    columns: Sequence[str] = COLUMNS

    def __init__(self, config: Config, task: BaseModel, *, flips: str = "") -> None:
        if "prepare" not in config:
            raise ValueError(f"config {config_name(config)} does not segment volumes; predict needs one that does")
        self.task = task
        self.prepare = Compose(build(config.prepare))
        self.classes = tuple(config.classes)
        self.modalities: Modalities = tuple(config.get("modalities", ()))
        self.channels = config.model.net.get("in_channels")
        self.flips = flip_sets(flips, x=2)
        parts = {key: settings(config)[key] for key in ("model", "prepare", "classes")}
        self.mark = mark_of(parts, self.flips, task.net)

    @torch.no_grad()
    def __call__(self, images: Sequence[Path]) -> np.ndarray:
        """Probabilities of background and classes, (c, x, y, z), on the grid of the files; they sum to one.

        Args:
            images: NIfTI files, one for each channel; or one that holds all of them.

        Raises:
            FileNotFoundError, ValueError: as the config's ``prepare``; the network takes another number of channels
                or gives other classes, or its output is not finite.
        """
        paths = [str(path) for path in images]
        item = prepared(self.prepare, {"image": paths[0] if len(paths) == 1 else paths})
        image = item["image"]
        if self.channels not in (None, len(image)):
            raise ValueError(
                f"{' '.join(paths)} prepared as the config says has {len(image)} channels, the network takes "
                f"{self.channels}; give all channels of a case, or use the config of these images"
            )
        chances = self.averaged(image.as_tensor()[None].to(device()))[0].float().cpu()
        if len(chances) != len(self.classes) + 1:
            raise ValueError(
                f"the network gives {len(chances)} classes, the config has {len(self.classes) + 1} (background, "
                f"{', '.join(self.classes)}); change the outputs of model.net, or classes"
            )
        if not chances.isfinite().all():
            raise ValueError(f"the network's output for {' '.join(paths)} is not finite; check its weights")
        item["label"] = MetaTensor(chances, affine=image.affine, applied_operations=image.applied_operations)
        invert = Invertd(keys="label", transform=self.prepare, orig_keys="image", nearest_interp=False)
        restored: np.ndarray = invert(item)["label"].numpy()
        restored[0] += 1 - restored.sum(axis=0)  # what ``prepare`` cut away is background
        return restored

    def averaged(self, image: Tensor) -> Tensor:
        """Probabilities (b, c, x, y, z), the mean over the flips."""
        total = torch.zeros(())
        for axes in self.flips:
            logits = self.task.inferer(image.flip(axes), self.task.net)
            total = total.to(logits.device) + logits.float().softmax(dim=1).flip(axes)
        return total / len(self.flips)

    def label(self, case: Case) -> Labelled:
        """A case of NIfTI files or DICOM series; errors as for ``Case.images``, ``read_series`` and a call."""
        with tempfile.TemporaryDirectory() as scratch:
            images = [as_nifti(path, Path(scratch)) for path in case.images()]
            chances = self(images)
            source: Any = nibabel.load(images[0])
            background = first_channel(source)
        labels = most_probable(chances)
        shown = upright(background, {"prediction": labels}, source.affine)
        return Labelled(source=source, probabilities=chances, labels=labels, shown={"": shown})

    def table(self, case: str, labels: Any) -> list[dict[str, Any]]:
        """Rows of the volumes in a label map, as nibabel reads it."""
        return volumes(case, labels, self.classes)


def first_channel(image: Any) -> np.ndarray:
    """Voxels (x, y, z) of an image, of its first channel if it has a fourth axis."""
    return np.asarray(image.dataobj, dtype=np.float32).reshape(*image.shape[:3], -1)[..., 0]


def flip_sets(flips: str, *, x: int) -> list[tuple[int, ...]]:
    """Every set of the axes in ``flips``, the empty one first, as axes of tensors in which y and z follow ``x``.

    Raises:
        ValueError: an axis is none of x, y and z, or there twice.
    """
    if set(flips) - set("xyz") or len(set(flips)) < len(flips):
        raise ValueError(f"flips along {flips!r} are none; give some of the axes x, y and z, such as xy")
    axes = sorted("xyz".index(axis) + x for axis in flips)
    return [chosen for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)]


def most_probable(chances: np.ndarray) -> np.ndarray:
    """Classes, as uint8 or, if there are more than 255, uint16, from probabilities whose first axis they are."""
    labels: np.ndarray = chances.argmax(axis=0).astype(np.min_scalar_type(len(chances) - 1))
    return labels


def as_nifti(path: Path, scratch: Path) -> Path:
    """The path itself, or of a DICOM series a NIfTI file in ``scratch``: configs read one format."""
    if not path.is_dir():
        return path
    voxels, affine = read_series(path)
    converted = scratch / f"{len(list(scratch.iterdir()))}.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), converted)
    return converted


def mark_of(parts: Mapping[str, Any], flips: Sequence[Sequence[int]], net: nn.Module) -> str:
    """This package, and sixteen hexadecimal digits that stand for parts of a config, flips and weights."""
    text = json.dumps([parts, flips], default=name_of)
    total = hashlib.sha256(text.encode())
    for name, value in sorted(net.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"vision_ssm {__version__} {total.hexdigest()[:16]}"


def name_of(part: Any) -> str:
    """A class or function by its name, without the address that differs from process to process."""
    return f"{part.__module__}.{part.__qualname__}" if hasattr(part, "__qualname__") else str(part)
