"""Cases to label: NIfTI files and DICOM series in a folder, put together where an image has several channels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.misc import is_dicom

from vision_ssm.data.dicom import series_files

__all__ = ["Case", "Modalities", "find_cases", "nifti_suffix", "stem"]

Modalities = Sequence[str | Sequence[str]]  # of each channel, what its files' names end with

NUMBERED = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One image.

    Attributes:
        name: of its outputs.
        place: the file, or the folder that holds its files.
        files: channel and NIfTI file, or folder of one DICOM series, as they were found.
    """

    name: str
    place: Path
    files: tuple[tuple[int, Path], ...]

    def images(self) -> list[Path]:
        """The channels in order.

        Raises:
            ValueError: there is none, one is missing between others, or there are two of one.
        """
        if not self.files:
            raise ValueError(f"{self.place} holds neither a NIfTI file nor the files of a DICOM series")
        numbers = sorted(number for number, _ in self.files)
        if numbers != list(range(len(numbers))):
            held = ", ".join(path.name for _, path in self.files)
            raise ValueError(
                f"{self.place} holds {held}, which are the channels {numbers} of {self.name}; each of "
                f"{list(range(len(numbers)))} is expected once; name them {self.name}_0000, "
                f"{self.name}_0001, ... or as the config's modalities"
            )
        return [path for _, path in sorted(self.files)]


def find_cases(source: Path, modalities: Modalities = ()) -> list[Case]:
    """The cases that ``source`` stands for, by name.

    Args:
        source: a NIfTI file; the folder of one DICOM series; or a folder of cases. There, NAME_0000, NAME_0001, ... are
            channels of NAME, be they files or series; a folder with several files or series is one case.
        modalities: how the names of the channels end, in order: ("t1", ("t2", "t2w")) for NAME_t1 and NAME-t2w.

    Raises:
        FileNotFoundError: there is no ``source``, or nothing to label in it.
        ValueError: ``source`` is a file of another kind, or two cases have one name.
    """
    if not source.exists():
        raise FileNotFoundError(f"no such volume: {source}. Give a .nii or .nii.gz file, a DICOM series or a folder")
    if source.is_file() and nifti_suffix(source) is None and is_dicom(source):
        raise ValueError(f"{source} is one file of a DICOM series; give the folder that holds them all")
    if source.is_file() or is_volume(source):
        return [Case(stem(source), source, ((0, source),))]
    cases = [Case(name, source, files) for name, files in grouped(source, modalities).items()]
    folders = (path for path in visible(source) if path.is_dir() and not is_volume(path))
    cases += [subject(folder, modalities) for folder in folders]
    if not cases:
        raise FileNotFoundError(f"no case in {source}: neither NIfTI files nor folders with a DICOM series")
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source} holds a file and a folder for {', '.join(twice)}; rename or move one")
    return sorted(cases, key=lambda case: case.name)


def subject(folder: Path, modalities: Modalities) -> Case:
    """A folder as one case of its name. Beside files that end like ``modalities``, others are left alone."""
    named = {path for path in visible(folder) if ending(stem(path), modalities)}
    groups = grouped(folder, modalities).values()
    files = tuple(file for group in groups for file in group if not named or file[1] in named)
    return Case(folder.name, folder, files)


def grouped(folder: Path, modalities: Modalities) -> dict[str, tuple[tuple[int, Path], ...]]:
    """Volumes directly in a folder: case -> channels and paths. NAME_seg beside modalities of NAME is left alone."""
    found = {path: ending(stem(path), modalities) for path in filter(is_volume, visible(folder))}
    beside = tuple(f"{case[0]}{joint}" for case in found.values() if case and modalities for joint in "_-")
    groups: dict[str, tuple[tuple[int, Path], ...]] = {}
    for path, case in found.items():
        if case is None and stem(path).startswith(beside):
            continue
        name, channel = case or (stem(path), 0)
        groups[name] = (*groups.get(name, ()), (channel, path))
    return groups


def ending(name: str, modalities: Modalities) -> tuple[str, int] | None:
    """Case and channel that a name ends with: one of the modalities, or four digits if there are none."""
    for channel, endings in enumerate(modalities):
        for one in (endings,) if isinstance(endings, str) else endings:
            if name == one or name.endswith((f"_{one}", f"-{one}")):
                return name.removesuffix(one).rstrip("_-"), channel
    numbered = None if modalities else NUMBERED.fullmatch(name)
    return (numbered[1], int(numbered[2])) if numbered else None


def is_volume(path: Path) -> bool:
    """Whether a path is called like a NIfTI file, or is a folder with DICOM files."""
    return bool(series_files(path)) if path.is_dir() else nifti_suffix(path) is not None


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def nifti_suffix(path: Path) -> str | None:
    """The end of a name that says NIfTI, as it is written there; None if there is none."""
    length = next((len(suffix) for suffix in (".nii.gz", ".nii") if path.name.lower().endswith(suffix)), None)
    return None if length is None else path.name[-length:]


def stem(path: Path) -> str:
    """Name of a file without .nii or .nii.gz, or of a folder."""
    return path.name.removesuffix(nifti_suffix(path) or "")
