"""Cases to score: a config's test set as a network labels it, or two folders of label maps."""
# Shapes: x y z the grid of a volume.

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from mmengine.config import Config
from monai.data import MetaTensor
from monai.transforms import Compose

from vision_ssm.data.dicom import read_series
from vision_ssm.data.volumes import LoadVolumed, check_grid, class_map, read_volume
from vision_ssm.engine.config import build
from vision_ssm.engine.metrics import HD95
from vision_ssm.engine.segmentation.cases import find_cases, nifti_suffix, stem
from vision_ssm.engine.segmentation.overlays import Shown, upright
from vision_ssm.engine.segmentation.predictor import Predictor, first_channel
from vision_ssm.engine.tasks import Segmentation
from vision_ssm.engine.training.device import device

__all__ = ["Sample", "Volumes", "folder_samples", "test_samples"]

Values = Sequence[Sequence[int]]
Read = Callable[[Path], tuple[np.ndarray, np.ndarray]]  # a file -> voxels (x, y, z) and affine


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """What a case is scored on.

    Attributes:
        image: shown in figures (x, y, z); None if there is none.
        prediction, truth: classes (x, y, z).
        spacing: millimetres between voxels along x, y and z.
        affine: to millimetres; None if it is not known.
    """

    image: np.ndarray | None
    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None = None

    def shown(self) -> Shown:
        """Truth and prediction over the image, for a figure."""
        image = np.zeros(self.truth.shape, np.float32) if self.image is None else self.image
        maps = {"truth": self.truth, "prediction": self.prediction}
        return Shown(image, maps, self.spacing) if self.affine is None else upright(image, maps, self.affine)


@dataclass(frozen=True)
class Sample:
    """A case by name, loaded when it is needed."""

    name: str
    load: Callable[[], Volumes]


def test_samples(config: Config, task: Segmentation) -> list[Sample]:
    """The cases of ``config.test_dataloader``.

    Files that are tested as they are prepared for prediction are scored on their own grids, which is what the user of a
    label map sees. Tests of anything else, half an image for instance, are scored as they come out of the data set.

    Raises:
        ValueError: items know no spacing, and no HD95 among the config's metrics states it.
    """
    options = config.test_dataloader.dataset
    preparation = options.get("transform")
    if preparation is not None and preparation == config.get("prepare"):
        predictor, entries = Predictor(config, task), build(options["data"])
        return [Sample(name, partial(on_own_grid, predictor, entry)) for name, entry in named(entries).items()]
    dataset = build(options)
    stated = next((metric.spacing for metric in build(config.test_evaluator) if isinstance(metric, HD95)), None)
    names = named(getattr(dataset, "data", range(len(dataset))))
    return [Sample(name, partial(as_prepared, task, dataset, i, stated)) for i, name in enumerate(names)]


def named(entries: Sequence[Any]) -> dict[str, Any]:
    """Entries by the name of their image's file or, if it is of several, of their folder; by number without files."""
    names: dict[str, Any] = {}
    for position, entry in enumerate(entries):
        image = entry["image"] if isinstance(entry, Mapping) else None
        if isinstance(image, (str, Path)):
            name = stem(Path(image))
        else:
            name = Path(image[0]).parent.name if isinstance(image, (list, tuple)) else str(position)
        names[name if name not in names else f"{name} {position}"] = entry
    return names


def on_own_grid(predictor: Predictor, entry: Mapping[str, Any]) -> Volumes:
    paths = [Path(path) for path in ([entry["image"]] if isinstance(entry["image"], (str, Path)) else entry["image"])]
    prediction = predictor(paths).argmax(axis=0)
    source: Any = nibabel.load(paths[0])
    truth, affine = read_classes(Path(entry["label"]), class_values(predictor.prepare))
    check_grid(f"image {paths[0]} and label {entry['label']}", (prediction, source.affine), (truth, affine))
    return Volumes(
        image=first_channel(source),
        prediction=prediction,
        truth=truth,
        spacing=spacing_of(source.affine),
        affine=source.affine,
    )


@torch.no_grad()
def as_prepared(task: Segmentation, dataset: Any, position: int, stated: tuple[float, ...] | None) -> Volumes:
    item = dataset[position]
    image, label = item["image"], item["label"]
    spacing = spacing_of(label.affine.numpy()) if isinstance(label, MetaTensor) else stated
    if spacing is None:
        raise ValueError(
            "the test items lost their affine, and no HD95 in test_evaluator states the spacing; add HD95(spacing=...)"
        )
    image, label = (torch.as_tensor(part).as_subclass(torch.Tensor) for part in (image, label))
    prediction = task.label_map(image[None].to(device()))[0, 0]
    return Volumes(
        image=image[len(image) // 2].numpy(),
        prediction=prediction.cpu().numpy(),
        truth=label[0].numpy(),
        spacing=spacing,
    )


def folder_samples(config: Config, predictions: Path, truth: Path, images: Path | None = None) -> list[Sample]:
    """Pairs of label maps with one name in two folders.

    Args:
        config: names the classes; its ``LoadVolumed`` says which values of a true file stand for each.
        predictions: files of classes 0, 1, ..., as ``vision-ssm predict`` writes them.
        truth: files whose names are those of the predictions. All of them are scored.
        images: shown in figures; see ``find_cases``.

    Raises:
        FileNotFoundError: a folder is missing or has no NIfTI files, or a prediction or image is missing.
        ValueError: a folder holds NAME.nii and NAME.nii.gz.
    """
    predicted, true = label_files(predictions), label_files(truth)
    shown = {} if images is None else {c.name: c.images()[0] for c in find_cases(images, config.get("modalities", ()))}
    require_all(truth, true, {predictions: predicted, images: shown})
    values = class_values(Compose(build(config.prepare)))
    classes = written_values(config)
    return [
        Sample(name, partial(pair_of, predicted[name], classes, path, values, shown.get(name)))
        for name, path in true.items()
    ]


def label_files(folder: Path) -> dict[str, Path]:
    """NIfTI files directly in a folder, by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; give one with label maps (.nii or .nii.gz)")
    files = [path for path in sorted(folder.iterdir()) if nifti_suffix(path) and not path.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"{folder} has no label maps (.nii or .nii.gz)")
    named = {stem(path): path for path in files}
    if twice := sorted(path.name for path in files if path not in named.values()):
        raise ValueError(f"{folder} holds two label maps of one case, such as {', '.join(twice)}; leave one of each")
    return named


def require_all(truth: Path, cases: Iterable[str], folders: Mapping[Path | None, Mapping[str, Path]]) -> None:
    """Raises FileNotFoundError unless every folder has a file for each case whose truth is known."""
    wanted = set(cases)
    for folder, files in folders.items():
        if folder is not None and (missing := sorted(wanted - files.keys())):
            raise FileNotFoundError(
                f"{folder} has no file for {len(missing)} of {len(wanted)} cases in {truth}: "
                f"{', '.join(missing[:10])}; label them, or take their truth out"
            )


def written_values(config: Config) -> Values:
    """The values of label maps that ``vision-ssm predict`` writes: the classes themselves."""
    return [(number,) for number in range(len(config.classes) + 1)]


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a NIfTI file or of the folder of a DICOM series."""
    return read_series(path) if path.is_dir() else read_volume(path)


def pair_of(
    predicted: Path,
    classes: Values,
    true: Path,
    values: Values,
    shown: Path | None,
    *,
    read: Read = read_image,
    read_truth: Read = read_volume,
) -> Volumes:
    """A case of two label maps, and of the image that is shown, if any; ``read`` serves all but the truth."""
    prediction, affine = read_classes(predicted, classes, read)
    truth, true_affine = read_classes(true, values, read_truth)
    check_grid(f"prediction {predicted} and truth {true}", (prediction, affine), (truth, true_affine))
    image = None
    if shown is not None:
        image, image_affine = read(shown)
        check_grid(f"image {shown} and truth {true}", (image, image_affine), (truth, true_affine))
    return Volumes(image=image, prediction=prediction, truth=truth, spacing=spacing_of(true_affine), affine=true_affine)


def read_classes(path: Path, values: Values, read: Read = read_volume) -> tuple[np.ndarray, np.ndarray]:
    """Classes (x, y, z) and affine of a label map; errors as for ``read`` and ``class_map``."""
    voxels, affine = read(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*background alone")  # a case like any other here
        return class_map(voxels, values, path).astype(np.uint16), affine


def class_values(prepare: Compose) -> Values:
    """The values that stand for each class in a file, as the config's loader knows them.

    Raises:
        ValueError: the config loads its volumes in another way.
    """
    for transform in prepare.transforms:
        if isinstance(transform, LoadVolumed):
            return transform.values
    raise ValueError("the config's prepare has no LoadVolumed, which says what values of a file are which class")


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
