"""Label maps for cine volumes, frame by frame on their own grids, and their scores."""
# Shapes: x y z the grid of a volume, t its frames in time.

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from rich.console import Console

from vision_ssm._version import __version__
from vision_ssm.data.cine import CineSlices, check_labelled, read_cine, read_labels
from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.config import build, config_name, resolve
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.outputs import require_output, require_outputs
from vision_ssm.engine.segmentation.cases import nifti_suffix, stem
from vision_ssm.engine.segmentation.measures import report, score_samples
from vision_ssm.engine.segmentation.overlays import overlays, upright
from vision_ssm.engine.segmentation.predict import Outputs, on_grid
from vision_ssm.engine.segmentation.samples import Sample, Volumes, spacing_of
from vision_ssm.engine.segmentation.volumes import volumes, write_volumes
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.clips import CineSegmentation

__all__ = ["CinePredictor", "label_cine", "measure_cines"]

FRAME_COLUMNS = ("case", "frame", "class", "label", "voxels", "millilitres", "extreme")


class CinePredictor:
    """A trained network that gives every voxel of every frame of a cine its class.

    Slices are scaled and resampled as the config's test set does, but whole. The network sees frames as far apart as
    there: where a cine has several times as many, those between are clips of their own.

    Args:
        config: one that segments cines.
        task: built from it, with trained weights, in evaluation mode.

    Raises:
        ValueError: the config does not test on ``CineSlices``.
    """

    def __init__(self, config: Config, task: CineSegmentation) -> None:
        options = config.test_dataloader.dataset
        if resolve(options["type"]) is not CineSlices:
            raise ValueError(f"config {config_name(config)} must test on CineSlices, which say how cines are prepared")
        self.task = task
        self.cases = options["cases"]
        self.reader: CineSlices = build({**options, "cases": ()})
        self.classes = tuple(config.classes)

    @torch.no_grad()
    def __call__(self, path: Path) -> np.ndarray:
        """Classes (x, y, z, t) on the grid of a file.

        Raises:
            FileNotFoundError, ValueError: the file is missing or no cine, see ``read_cine``, or the network's output is
                not finite.
        """
        voxels, affine = read_cine(path)
        slices, _ = self.reader.resampled(voxels, affine, "bilinear")
        apart = max(1, voxels.shape[3] // self.reader.frames)
        labels = np.zeros(voxels.shape, np.min_scalar_type(len(self.classes)))
        for z, film in enumerate(slices):
            for first in range(apart):
                logits = self.task(film[None, first::apart, None].to(device()))[0].float()
                if not logits.isfinite().all():
                    raise ValueError(f"the network's output for {path} is not finite; check its weights")
                maps = F.interpolate(logits, size=voxels.shape[:2], mode="bilinear").argmax(dim=1)
                labels[:, :, z, first::apart] = maps.movedim(0, -1).cpu().numpy()
        return labels


def label_cine(
    config: Config, checkpoint: Path, source: Path, target: Path, *, console: Console, overwrite: bool = False
) -> int:
    """Labels every frame of a cine by a checkpoint of a config; returns 0.

    Beside the label map go an overlay of the frames in which most and least is labelled, and a table of the volumes of
    each class in each frame, with the frames in which it is largest and smallest. The label map is written last.

    Args:
        source: NIfTI file of x, y, z and time.
        target: label map to write (.nii or .nii.gz), on the very grid of ``source``, time included.
        overwrite: replace files that exist.

    Raises:
        FileExistsError, PermissionError: an output exists and ``overwrite`` is off, or their folder cannot be written.
        FileNotFoundError, ValueError: a file is missing, unreadable, of another model, or no cine; or the network's
            output is not finite. Nothing is written then.
    """
    if nifti_suffix(target) is None:
        raise ValueError(f"output {target} must end in .nii or .nii.gz; cines are labelled one by one")
    outputs = Outputs.beside(target, probabilities=False)
    require_outputs([*outputs.maps(), outputs.volumes], source, overwrite=overwrite)
    task = load_task(config, checkpoint)
    assert isinstance(task, CineSegmentation)
    predictor = CinePredictor(config, task)
    labels = predictor(source)
    image: Any = nibabel.load(source)
    result = on_grid(labels, image, f"vision_ssm {__version__}")
    for field in ("pixdim", "toffset"):
        result.header[field] = image.header[field]
    table = by_frame(stem(source), result, predictor.classes)
    shown = (labels > 0).sum(axis=(0, 1, 2))
    extremes = {"most labelled": int(shown.argmax()), "least labelled": int(shown.argmin())}
    figure = {
        f"frame {frame + 1}, {title}": upright(
            np.asarray(image.dataobj[..., frame], np.float32), {"prediction": labels[..., frame]}, image.affine
        )
        for title, frame in extremes.items()
    }
    save_figure(outputs.overlay, overlays(figure, predictor.classes))
    write_volumes(outputs.volumes, {stem(source): table}, FRAME_COLUMNS)
    write_atomically(target, lambda partial: nibabel.save(result, partial))
    console.print(f"labels:  {target}\noverlay: {outputs.overlay}\nvolumes: {outputs.volumes}")
    return 0


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


def measure_cines(
    config: Config, checkpoint: Path, *, console: Console, tolerance: float = 1.0, out: Path | None = None
) -> None:
    """Prints the scores of the frames of a config's test set that have labels, and writes them if ``out`` is given.

    Each such frame is a case, scored as a volume on its own grid.

    Args:
        tolerance: of NSD, in millimetres.
        out: JSON file; a table and a figure come beside it, see ``report``.

    Raises:
        FileNotFoundError, ValueError: see ``load_task``, ``require_output``, ``score_samples`` and ``CinePredictor``;
            or the test set has no labels.
    """
    require_output(out)
    task = load_task(config, checkpoint)
    assert isinstance(task, CineSegmentation)
    predictor = CinePredictor(config, task)
    samples = frame_samples(predictor)
    if not samples:
        raise ValueError(f"the test set of config {config_name(config)} has no labels; give it classes and labels")
    evaluation = score_samples(samples, predictor.classes, console=console, tolerance=tolerance)
    report(
        evaluation, samples, {"config": config_name(config), "checkpoint": str(checkpoint)}, console=console, out=out
    )


def frame_samples(predictor: CinePredictor) -> list[Sample]:
    """The frames of the test set that have labels, those of a cine in turn."""
    values = predictor.reader.values
    if values is None:
        return []
    labelled = lru_cache(maxsize=1)(predictor)  # the frames of a cine follow each other
    return [
        Sample(f"{stem(Path(case['video']))} frame {frame + 1}", partial(frame_of, labelled, case, frame, values))
        for case in build(predictor.cases)
        for frame in sorted(case["labels"])
    ]


def frame_of(
    labelled: Callable[[Path], np.ndarray], case: Mapping[str, Any], frame: int, values: Sequence[Sequence[int]]
) -> Volumes:
    path = Path(case["video"])
    prediction = labelled(path)
    check_labelled(path, prediction.shape[3], [frame])
    image: Any = nibabel.load(path)
    truth = read_labels(case["labels"][frame], values, path, (prediction[..., frame], image.affine))
    return Volumes(
        image=np.asarray(image.dataobj[..., frame], np.float32),
        prediction=prediction[..., frame],
        truth=truth.astype(np.uint16),
        spacing=spacing_of(image.affine),
        affine=image.affine,
    )
