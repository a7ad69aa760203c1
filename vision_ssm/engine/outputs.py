"""Where a command may write, asked before it works."""

from collections.abc import Sequence
from pathlib import Path

from vision_ssm.engine.checkpoint import make_writable

__all__ = ["require_output", "require_outputs"]


def require_outputs(outputs: Sequence[Path], source: Path, *, overwrite: bool) -> None:
    """Raises unless every output can be written.

    Args:
        outputs: files in one folder.
        source: what is read.
        overwrite: files that exist may be replaced.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is off, or is a folder.
        FileNotFoundError, PermissionError: their folder is missing, or cannot be written.
        ValueError: an output is the source.
    """
    folder = outputs[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; create it first")
    for path in outputs:
        if path.resolve() == source.resolve():
            raise ValueError(f"output {path} is the input itself; choose another")
        if path.is_dir():
            raise FileExistsError(f"output {path} is a folder; choose another name")
    if existing := [str(path) for path in outputs if path.exists() and not overwrite]:
        raise FileExistsError(f"{' and '.join(existing)} exist; choose another output or pass --overwrite")
    make_writable(folder)


def require_output(out: Path | None) -> None:
    """Raises before any work is done if ``out`` cannot be written."""
    if out is None:
        return
    if out.suffix != ".json":
        raise ValueError(f"output {out} must end in .json; a table (.csv) and a figure (.png) are written beside it")
    if out.is_dir():
        raise FileExistsError(f"output {out} is a folder; choose another name")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}; create it first")
    make_writable(out.parent)
