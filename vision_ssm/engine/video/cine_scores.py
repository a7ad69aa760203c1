"""Scores of the frames of cines that have labels, each as a volume on its own grid."""
# Shapes: x y z the grid of a volume, t its frames in time.

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from mmengine.config import Config
from rich.console import Console

from vision_ssm.data.cine import CineSlices, check_labelled, open_cine, read_labels
from vision_ssm.data.volumes import read_volume, voxels_of
from vision_ssm.engine.config import build, config_name
from vision_ssm.engine.findings import origin
from vision_ssm.engine.outputs import require_output
from vision_ssm.engine.segmentation.cases import find_cases, stem
from vision_ssm.engine.segmentation.measures import report, score_samples
from vision_ssm.engine.segmentation.predictor import most_probable
from vision_ssm.engine.segmentation.samples import (
    Sample,
    Volumes,
    label_files,
    pair_of,
    require_all,
    spacing_of,
    written_values,
)
from vision_ssm.engine.video.cine import CinePredictor, cine_predictor, cine_reader

__all__ = ["measure_cine_folder", "measure_cines"]

FRAME = re.compile(r"(.+)_frame(\d+)(_gt)?")  # a label map of one frame, counted from 1


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
    predictor = cine_predictor(config, checkpoint)
    samples = tested_frames(config, predictor)
    evaluation = score_samples(samples, predictor.classes, console=console, tolerance=tolerance)
    report(evaluation, samples, origin(config, checkpoint=checkpoint), console=console, out=out)


def measure_cine_folder(
    config: Config,
    labels: Path,
    truth: Path,
    images: Path | None = None,
    *,
    console: Console,
    tolerance: float = 1.0,
    out: Path | None = None,
) -> None:
    """As ``measure_cines``, of label maps in a folder against true ones in another; see ``folder_frames``.

    Raises:
        FileNotFoundError, ValueError: see ``folder_frames``, ``require_output`` and ``score_samples``.
    """
    require_output(out)
    samples = folder_frames(config, labels, truth, images)
    evaluation = score_samples(samples, config.classes, console=console, tolerance=tolerance)
    report(evaluation, samples, origin(config, labels=labels, truth=truth), console=console, out=out)


def known_values(config: Config, reader: CineSlices) -> Sequence[Sequence[int]]:
    """The values of a true file that stand for each class."""
    if reader.values is None:
        raise ValueError(f"the test set of config {config_name(config)} has no labels; give it classes and labels")
    return reader.values


def tested_frames(config: Config, predictor: CinePredictor) -> list[Sample]:
    """The frames of the test set that have labels, those of a cine in turn.

    Raises:
        ValueError: there are none.
    """
    values = known_values(config, predictor.reader)

    @lru_cache(maxsize=1)  # the frames of a cine follow each other
    def labelled(path: Path) -> np.ndarray:
        return most_probable(predictor(path))

    return [
        Sample(f"{stem(Path(case['video']))} frame {frame + 1}", partial(frame_of, labelled, case, frame, values))
        for case in build(config.test_dataloader.dataset["cases"])
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


def folder_frames(config: Config, predictions: Path, truth: Path, images: Path | None = None) -> list[Sample]:
    """Frames of label maps in a folder, with the true ones of the same frames in another.

    Args:
        config: names the classes; its test set says which values of a true file stand for each.
        predictions: NAME.nii or NAME.nii.gz of every frame of a cine, as ``vision-ssm predict`` writes them.
        truth: NAME as well, of every frame; or NAME_frameXX or NAME_frameXX_gt of one, counted from 1. All are scored.
        images: cines that are shown in figures; see ``find_cases``.

    Raises:
        FileNotFoundError: a folder is missing or has no NIfTI files, or a prediction or image is missing.
        ValueError: the config's test set knows no classes, or a frame has two files.
    """
    values = known_values(config, cine_reader(config))
    true, predicted = true_frames(truth), label_files(predictions)
    cases = [] if images is None else find_cases(images, config.get("modalities", ()))
    shown = {case.name: case.images()[0] for case in cases}
    require_all(truth, [name for name, _ in true], {predictions: predicted, images: shown})

    @lru_cache(maxsize=3)  # the frames of a cine follow each other
    def cine(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = open_cine(path)
        return voxels_of(image, path), image.affine

    def frame_at(frame: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
        voxels, affine = cine(path)
        check_labelled(path, voxels.shape[3], [frame])
        return voxels[..., frame], affine

    samples = []
    for (name, frame), path in sorted(true.items()):
        read = partial(frame_at, frame)
        files = predicted[name], written_values(config), path, values, shown.get(name)
        read_truth = read_volume if FRAME.fullmatch(stem(path)) else read
        samples.append(Sample(f"{name} frame {frame + 1}", partial(pair_of, *files, read=read, read_truth=read_truth)))
    return samples


def true_frames(truth: Path) -> dict[tuple[str, int], Path]:
    """Case and frame, counted from 0 -> the file that has its labels."""
    found: dict[tuple[str, int], Path] = {}
    for name, path in label_files(truth).items():
        one = FRAME.fullmatch(name)
        frames = [(one[1], int(one[2]) - 1)] if one else [(name, frame) for frame in range(open_cine(path).shape[3])]
        for frame in frames:
            if frame in found:
                raise ValueError(f"{found[frame]} and {path} are of one frame, {frame[1] + 1}; leave one of them")
            found[frame] = path
    return found
