"""Label maps for new volumes and cines, on their own grids, one at a time or a folder of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nibabel
import numpy as np
from mmengine.config import Config
from nibabel.filebasedimages import ImageFileError
from rich.console import Console
from rich.progress import track

from vision_ssm.engine.checkpoint import make_writable, write_atomically
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.outputs import require_outputs
from vision_ssm.engine.segmentation.cases import Case, Modalities, find_cases, nifti_suffix
from vision_ssm.engine.segmentation.overlays import overlays
from vision_ssm.engine.segmentation.predictor import Labelled, Predictor
from vision_ssm.engine.segmentation.volumes import read_volumes, write_volumes
from vision_ssm.engine.training.evaluate import load_task

__all__ = ["Batch", "Labeller", "Outputs", "label", "label_by", "predict_file", "predict_folder"]

QFORM = ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")


SFORM = ("sform_code", "srow_x", "srow_y", "srow_z")


GRID = ("pixdim", "xyzt_units", *QFORM, *SFORM)  # fields of a NIfTI header that place voxels in space


FAILURES = (ValueError, TypeError, LookupError, OSError, RuntimeError, MemoryError)


class Labeller(Protocol):
    """What labels cases: of volumes ``Predictor`` does, which says what its parts are."""

    classes: tuple[str, ...]
    modalities: Modalities
    columns: Sequence[str]
    mark: str

    def label(self, case: Case) -> Labelled: ...

    def table(self, case: str, labels: Any) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Outputs:
    """Files of one case; the label map is written last, so where it is, all are.

    Attributes:
        labels: NIfTI file of uint8 classes (x, y, z), or uint16 if there are more than 255.
        overlay: PNG of the labels over the image.
        probabilities: NIfTI file (x, y, z, classes), or (x, y, z, t, classes) of a cine; None if not asked for.
        volumes: CSV of the millilitres of each class; a folder's cases share one.
    """

    labels: Path
    overlay: Path
    probabilities: Path | None
    volumes: Path

    @classmethod
    def beside(cls, labels: Path, *, probabilities: bool) -> "Outputs":
        """Those of a lone label map."""
        name = labels.name.removesuffix(nifti_suffix(labels) or "")
        chances = labels.with_name(f"{name}_probabilities.nii.gz") if probabilities else None
        return cls(labels, labels.with_name(f"{name}.png"), chances, labels.with_name(f"{name}.csv"))

    @classmethod
    def within(cls, folder: Path, case: str, *, probabilities: bool) -> "Outputs":
        """Those of a case in a folder: label maps lie in it, all else in folders of their own."""
        chances = folder / "probabilities" / f"{case}.nii.gz" if probabilities else None
        return cls(folder / f"{case}.nii.gz", folder / "overlays" / f"{case}.png", chances, folder / "volumes.csv")

    def maps(self) -> list[Path]:
        return [path for path in (self.labels, self.overlay, self.probabilities) if path]

    def finished(self, case: Case) -> bool:
        """Whether all are there, and no image was changed after its labels were written."""
        changed = max((path.stat().st_mtime_ns for _, path in case.files), default=0)
        return all(path.exists() for path in self.maps()) and self.labels.stat().st_mtime_ns >= changed


@dataclass(frozen=True)
class Batch:
    """What became of the cases of a folder.

    Attributes:
        written: names of those that were labelled now.
        kept: names of those that had been labelled before.
        failed: name of each other case -> why.
    """

    written: list[str]
    kept: list[str]
    failed: dict[str, str]


def label(
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
    """Labels volumes by a checkpoint of a config, as ``label_by`` does.

    Args:
        flips: see ``Predictor``.

    Raises:
        FileExistsError, PermissionError, FileNotFoundError, ValueError: see ``label_by``, ``load_task``, ``Predictor``.
    """
    predictor = Predictor(config, load_task(config, checkpoint), flips=flips)
    return label_by(predictor, source, target, console=console, overwrite=overwrite, probabilities=probabilities)


def label_by(
    predictor: Labeller,
    source: Path,
    target: Path,
    *,
    console: Console,
    overwrite: bool = False,
    probabilities: bool = False,
) -> int:
    """Labels one case, or every case of a folder; 1 if a case of a folder failed, else 0.

    Args:
        target: a label map (.nii or .nii.gz), see ``predict_file``; or a folder, see ``predict_folder``.
        console: where the progress goes; failures go to stderr.

    Raises:
        FileExistsError, PermissionError, FileNotFoundError, ValueError: see these.
    """
    if nifti_suffix(target) or (target.suffix and not target.exists()):
        written = predict_file(predictor, source, target, probabilities=probabilities, overwrite=overwrite)
        console.print(f"labels:  {written.labels}\noverlay: {written.overlay}\nvolumes: {written.volumes}")
        return 0
    batch = predict_folder(predictor, source, target, console=console, probabilities=probabilities, overwrite=overwrite)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for case, reason in batch.failed.items():
        errors.print(f"vision-ssm: {case} failed: {reason}")
    counts = f"{len(batch.written)} labelled, {len(batch.kept)} kept from before, {len(batch.failed)} failed"
    console.print(f"{counts}; labels, overlays and volumes are in {target}")
    return 1 if batch.failed else 0


def predict_file(
    predictor: Labeller, source: Path, target: Path, *, probabilities: bool = False, overwrite: bool = False
) -> Outputs:
    """Labels ``source`` and writes the map to ``target``, its overlay and its volumes beside it.

    Args:
        source: a NIfTI file, the folder of a DICOM series, or of the channels of one case.
        target: a path that ends in .nii or .nii.gz.
        probabilities: write them too.
        overwrite: replace files that exist.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is off.
        PermissionError: the folder of ``target`` cannot be written.
        FileNotFoundError, ValueError: the volume is missing or unreadable or several, ``target`` is no NIfTI name, or
            its folder is missing.
    """
    if nifti_suffix(target) is None:
        raise ValueError(f"output {target} must end in .nii or .nii.gz, or be a folder that exists")
    outputs = Outputs.beside(target, probabilities=probabilities)
    require_outputs([*outputs.maps(), outputs.volumes], source, overwrite=overwrite)
    case, *others = find_cases(source, predictor.modalities)
    if others:
        raise ValueError(f"{source} holds {len(others) + 1} cases; give a folder instead of {target} for their labels")
    write_volumes(outputs.volumes, {case.name: write_case(predictor, case, outputs)}, predictor.columns)
    return outputs


def predict_folder(
    predictor: Labeller,
    source: Path,
    folder: Path,
    *,
    console: Console,
    probabilities: bool = False,
    overwrite: bool = False,
) -> Batch:
    """Labels every case of ``source`` into ``folder``, which is made if need be; finished cases are kept.

    A case whose images are newer than its labels is not finished. One that fails is left out and named in the result.
    Killed at any moment, the same call goes on where it was.

    Args:
        source: see ``find_cases``.
        folder: outside ``source``.
        console: where the progress goes.
        probabilities: write them too.
        overwrite: label all cases anew.

    Raises:
        FileExistsError: ``folder`` holds a label map of one of these names that is not by this very predictor, and
            ``overwrite`` is off.
        PermissionError: ``folder`` cannot be written.
        FileNotFoundError, ValueError: ``folder`` lies among the images or has another table of volumes, or ``source``
            has no cases.
    """
    require_apart(folder, source)
    cases = find_cases(source, predictor.modalities)
    outputs = {case.name: Outputs.within(folder, case.name, probabilities=probabilities) for case in cases}
    if not overwrite:
        require_own(predictor, [one.labels for one in outputs.values()])
    rows = read_volumes(folder / "volumes.csv", predictor.columns)
    make_folders(folder, outputs.values())
    if overwrite:
        for name, one in outputs.items():
            one.labels.unlink(missing_ok=True)  # an older one would pass for finished, if this call were killed
            rows.pop(name, None)

    batch = Batch([], [], {})
    for case in track(cases, "labelling", console=console, disable=not console.is_terminal):
        one = outputs[case.name]
        finished = False
        try:
            if not (finished := one.finished(case)):
                rows[case.name] = write_case(predictor, case, one)
            elif case.name not in rows:
                rows[case.name] = predictor.table(case.name, nibabel.load(one.labels))
            write_volumes(one.volumes, rows, predictor.columns)
        except FAILURES as error:
            batch.failed[case.name] = " ".join(str(error).split()) or type(error).__name__
        else:
            (batch.kept if finished else batch.written).append(case.name)
        if not console.is_terminal:
            console.print(f"{case.name}: {'failed' if case.name in batch.failed else 'done'}")
    return batch


def require_apart(folder: Path, source: Path) -> None:
    """Raises ValueError if label maps would lie among the images, and be taken for images the next time."""
    images = source.resolve() if source.is_dir() else source.resolve().parent
    place = folder.resolve()
    if place == images or (source.is_dir() and place.is_relative_to(images)):
        raise ValueError(f"output {folder} lies among the images in {images}; choose a folder outside")


def require_own(predictor: Labeller, maps: Iterable[Path]) -> None:
    """Raises FileExistsError unless every map that exists is by this network with these settings."""
    for path in filter(Path.exists, maps):
        try:
            image: Any = nibabel.load(path)
            mark = image.header["descrip"].item().decode("ascii", "replace")
        except (ImageFileError, ValueError, OSError):
            mark = ""
        if mark != predictor.mark:
            raise FileExistsError(
                f"{path} exists and is not by these weights with this config and these flips; choose another "
                "folder, or pass --overwrite to label its case anew"
            )


def make_folders(folder: Path, outputs: Iterable[Outputs]) -> None:
    for needed in dict.fromkeys([folder, *(path.parent for one in outputs for path in one.maps())]):
        make_writable(needed)


def write_case(predictor: Labeller, case: Case, outputs: Outputs) -> list[dict[str, Any]]:
    """Labels one case and writes its maps, the labels last; returns its rows of the table of volumes."""
    found = predictor.label(case)
    save_figure(outputs.overlay, overlays(found.shown, predictor.classes))
    if outputs.probabilities:
        maps = on_grid(np.moveaxis(found.probabilities, 0, -1), found, predictor.mark)
        write_atomically(outputs.probabilities, lambda partial: nibabel.save(maps, partial))
    labels = on_grid(found.labels, found, predictor.mark)
    write_atomically(outputs.labels, lambda partial: nibabel.save(labels, partial))
    return predictor.table(case.name, labels)


def on_grid(voxels: np.ndarray, found: Labelled, mark: str) -> nibabel.Nifti1Image:
    """Labels, or probabilities with their classes last, with the very grid of their source.

    Both of its transforms are kept, and the time between the frames of a cine.
    """
    source, axes = found.source, found.labels.ndim
    header = nibabel.Nifti1Header()
    for field in GRID if axes == 3 else (*GRID, "toffset"):
        header[field] = source.header[field]
    header["pixdim"][axes + 1 :] = 1
    header["descrip"] = mark
    header.set_data_dtype(voxels.dtype)
    return nibabel.Nifti1Image(voxels, source.affine, header)
