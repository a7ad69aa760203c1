"""Label maps for cine volumes, frame by frame on their own grids."""
# Shapes: x y z the grid of a volume, t its frames in time.

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from rich.console import Console
from torch import Tensor

from vision_ssm.data.cine import CineSlices, read_cine
from vision_ssm.engine.config import build, config_name, resolve, settings
from vision_ssm.engine.segmentation.cases import Case, Modalities
from vision_ssm.engine.segmentation.overlays import upright
from vision_ssm.engine.segmentation.predict import label_by
from vision_ssm.engine.segmentation.predictor import Labelled, flip_sets, mark_of, most_probable
from vision_ssm.engine.segmentation.volumes import volumes
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.clips import CineSegmentation

__all__ = ["CinePredictor", "cine_predictor", "cine_reader", "label_cine"]

FILM_X, FILM_Z = 3, 5  # axes of a film (1, t, 1, h, w), as if z followed x and y
FRAME_COLUMNS = ("case", "frame", "class", "label", "voxels", "millilitres", "extreme")


class CinePredictor:
    """A trained network that gives every voxel of every frame of a cine its probabilities.

    Slices are scaled and resampled as the config's test set does, but whole. The network sees frames as far apart as
    there: where a cine has several times as many, those between are clips of their own.

    Attributes:
        columns, mark: as of ``Predictor``.

    Args:
        config: one that segments cines.
        task: built from it, with trained weights, in evaluation mode.
        flips: axes of a cine, such as "xy"; probabilities are averaged over all flips along them. One along z changes
            nothing, since slices are labelled one by one.

    Raises:
        ValueError: the config does not test on ``CineSlices``, or an axis is none of x, y and z.
    """

    columns: Sequence[str] = FRAME_COLUMNS

    def __init__(self, config: Config, task: CineSegmentation, *, flips: str = "") -> None:
        self.reader = cine_reader(config)
        self.flips = [axes for axes in flip_sets(flips, x=FILM_X) if FILM_Z not in axes]
        self.task = task
        self.classes = tuple(config.classes)
        self.modalities: Modalities = tuple(config.get("modalities", ()))
        options = config.test_dataloader.dataset
        prepared = {name: value for name, value in options.items() if name != "cases"}
        parts = {"model": settings(config)["model"], "prepare": prepared, "classes": self.classes}
        self.mark = mark_of(parts, self.flips, task.net)

    @torch.no_grad()
    def __call__(self, path: Path) -> np.ndarray:
        """Probabilities of background and classes, (c, x, y, z, t), on the grid of a file; they sum to one.

        Raises:
            FileNotFoundError, ValueError: the file is missing or no cine, see ``read_cine``, or the network's output is
                not finite.
        """
        voxels, affine = read_cine(path)
        slices, _ = self.reader.resampled(voxels, affine, "bilinear")
        apart = max(1, voxels.shape[3] // self.reader.frames)
        chances = np.empty((len(self.classes) + 1, *voxels.shape), np.float32)
        for z, film in enumerate(slices):
            for first in range(apart):
                maps = self.averaged(film[None, first::apart, None].to(device()), voxels.shape[:2])
                if not maps.isfinite().all():
                    raise ValueError(f"the network's output for {path} is not finite; check its weights")
                chances[:, :, :, z, first::apart] = maps.permute(1, 2, 3, 0).cpu().numpy()
        return chances

    def averaged(self, film: Tensor, size: Sequence[int]) -> Tensor:
        """Probabilities (t, c, x, y) of ``size`` of a film (1, t, 1, h, w), the mean over the flips."""
        total = torch.zeros(())
        for axes in self.flips:
            logits = self.task(film.flip(axes)).float().flip(axes)[0]
            maps = F.interpolate(logits, size=tuple(size), mode="bilinear").softmax(dim=1)
            total = total.to(maps.device) + maps
        return total / len(self.flips)

    def label(self, case: Case) -> Labelled:
        """A case of one NIfTI file, shown where most and where least is labelled.

        Raises:
            FileNotFoundError, ValueError: it is of several files, or a DICOM series, or as for a call.
        """
        path, *others = case.images()
        if others or path.is_dir():
            raise ValueError(f"{case.place} is no cine, which is one NIfTI file of x, y, z and time; convert it to one")
        chances = self(path)
        image: Any = nibabel.load(path)
        labels = most_probable(chances)
        counts = (labels > 0).sum(axis=(0, 1, 2))
        shown = {
            f"frame {frame + 1}, {title}": upright(
                np.asarray(image.dataobj[..., frame], np.float32), {"prediction": labels[..., frame]}, image.affine
            )
            for title, frame in {"most labelled": int(counts.argmax()), "least labelled": int(counts.argmin())}.items()
        }
        return Labelled(source=image, probabilities=chances, labels=labels, shown=shown)

    def table(self, case: str, labels: Any) -> list[dict[str, Any]]:
        """Rows of the volumes in each frame of a label map, as nibabel reads it."""
        return by_frame(case, labels, self.classes)


def cine_reader(config: Config) -> CineSlices:
    """What prepares cines as the test set of a config does, without any.

    Raises:
        ValueError: the config does not test on ``CineSlices``.
    """
    options = config.test_dataloader.dataset
    if resolve(options["type"]) is not CineSlices:
        raise ValueError(f"config {config_name(config)} must test on CineSlices, which say how cines are prepared")
    reader: CineSlices = build({**options, "cases": ()})
    return reader


def label_cine(
    config: Config,
    checkpoint: Path,
    source: Path,
    target: Path,
    *,
    console: Console,
    overwrite: bool = False,
    probabilities: bool = False,
    flips: str = "",
) -> int:
    """Labels every frame of a cine, or of every cine of a folder, by a checkpoint of a config, as ``label_by`` does.

    The overlays show the frames in which most and least is labelled. The table has the volumes of each class in each
    frame, and says in which it is largest and smallest.

    Args:
        flips: see ``CinePredictor``.

    Raises:
        FileExistsError, PermissionError, FileNotFoundError, ValueError: see ``label_by``, ``load_task`` and
            ``CinePredictor``.
    """
    predictor = cine_predictor(config, checkpoint, flips=flips)
    return label_by(predictor, source, target, console=console, overwrite=overwrite, probabilities=probabilities)


def cine_predictor(config: Config, checkpoint: Path, *, flips: str = "") -> CinePredictor:
    """The predictor of a checkpoint; errors as for ``load_task`` and ``CinePredictor``."""
    task = load_task(config, checkpoint)
    assert isinstance(task, CineSegmentation)
    return CinePredictor(config, task, flips=flips)


def by_frame(case: str, image: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the volumes of each class in each frame of a label map (x, y, z, t); frames count from 1."""
    rows = [
        {**row, "frame": frame + 1, "extreme": ""}
        for frame in range(image.shape[3])
        for row in volumes(case, image.slicer[..., frame], classes)
    ]
    for name in classes:
        sizes = sorted((row for row in rows if row["class"] == name), key=lambda row: row["voxels"])
        if sizes[0]["voxels"] < sizes[-1]["voxels"]:
            sizes[0]["extreme"], sizes[-1]["extreme"] = "smallest", "largest"
    return rows
