"""Rows of a benchmark: their JSON lines, and the Markdown tables that are rendered from them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

__all__ = [
    "COPY",
    "Accuracy",
    "Clip",
    "Environment",
    "Row",
    "Timing",
    "fill",
    "filled",
    "read_rows",
    "render",
    "write_rows",
]

COPY = "copy"
"""Subject of rows that copy as many bytes as an operator's case compels to be moved."""

_BLOCK = re.compile(r"(?P<head><!-- benchmark (?P<files>[^>]+?) -->\n).*?(?P<tail><!-- /benchmark -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a row was measured; only rows of one environment may be compared."""

    device: str
    threads: int
    torch: str
    timm: str
    triton: str | None
    numba: str | None
    commit: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one run over several runs.

    Args:
        peak_mib: highest device memory of one run, inputs included; None on a CPU.
        clock_mhz: clock of the GPU's multiprocessors right after; None on a CPU, or where it cannot be read.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    peak_mib: float | None
    clock_mhz: int | None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What a row of an operator must have and a row of a model cannot.

    Args:
        error: largest deviation from the float64 reference, relative to the reference's largest value, over the output
            and (backward) all gradients.
        compulsory_bytes: each input read once and each output written once.
    """

    error: float
    compulsory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a row of a model of video has and no other row.

    Args:
        frames: of each clip that go through the model in one run.
        state_bytes: of the state after the frames that the case names; None in training.
    """

    frames: int
    state_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Args:
        subject: operator or model.
        case: name of the operator's shapes, the side of the model's image, "224 px" or "224 px, compiled", the
            network's volume, "128^3 voxels", or the frames of the model's clip, "300 frames, compiled".
        batch: samples of one run.
        direction: "forward" or "forward+backward".
        dtype: of the tensors, or of the autocast.
        layout: order of the axes in memory.
        timing: None where there was no memory for the run, as ``note`` says.
        accuracy: of operators.
        clip: of models of video.
        note: what the other fields cannot tell, such as a time that is a sum.
        processes: that shared the work, where their number was part of the question.
    """

    suite: str
    subject: str
    case: str
    batch: int
    direction: str
    dtype: str
    layout: str
    timing: Timing | None
    accuracy: Accuracy | None
    environment: Environment
    clip: Clip | None = None
    note: str = ""
    processes: int | None = None

    @property
    def gb_per_s(self) -> float:
        """Compulsory bytes of an operator over its median time."""
        assert self.accuracy is not None and self.timing is not None
        return self.accuracy.compulsory_bytes / self.timing.median_ms / 1e6

    @property
    def samples_per_s(self) -> float:
        assert self.timing is not None
        return 1e3 * self.batch / self.timing.median_ms

    @property
    def peak_mib(self) -> float | None:
        return self.timing.peak_mib if self.timing else None

    @property
    def frames_per_s(self) -> float:
        assert self.clip is not None
        return self.clip.frames * self.samples_per_s

    @property
    def side(self) -> int | None:
        """Side of a timed model's image in pixels; None for all else."""
        side, unit, _ = self.case.partition(" px")
        return int(side) if unit and self.timing else None

    @property
    def run(self) -> str:
        """How a model was run: "eager", "compiled" or "compiled, CUDA graphs"."""
        return self.case.partition(" px, ")[2] or "eager"

    @classmethod
    def from_json(cls, line: str) -> "Row":
        fields = json.loads(line)
        kinds = {"timing": Timing, "accuracy": Accuracy, "clip": Clip, "environment": Environment}
        nested = {
            name: kind(**fields[name]) for name, kind in kinds.items() if name in fields and fields[name] is not None
        }
        return cls(**{**fields, **nested})


def write_rows(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """Passes rows on while it writes them; ``path`` appears when the last is there, until then ``path``.part grows.

    Raises:
        FileExistsError: ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists, and results are never overwritten; choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row)) + "\n")
            lines.flush()
            yield row
    part.replace(path)


_Lines = Callable[[Sequence[Row]], Iterator[str]]


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of JSON lines; raises ValueError naming the line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is no benchmark row: {error}") from error
    return rows


def render(rows: Sequence[Row]) -> str:
    """Markdown: one table for each environment and kind of row, in the order of measurement."""

    def kind(row: Row) -> tuple[Environment, _Lines]:
        return row.environment, _clip_lines if row.clip else _operator_lines if row.accuracy else _model_lines

    tables = []
    for (environment, lines), group in groupby(rows, key=kind):
        members = list(group)
        body = lines(members)
        tables.append("\n".join([_caption(environment, members), "", *body]))
    return "\n\n".join(tables) + "\n"


def filled(document: Path) -> str:
    """Text of ``document`` with each ``<!-- benchmark FILE... -->`` block rendered anew; paths are relative to it.

    Raises:
        ValueError: the document has no such block, or a file holds something else than rows.
    """
    text = document.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise ValueError(f"{document} has no block <!-- benchmark FILE... --> ... <!-- /benchmark --> to fill")

    def rendered(block: re.Match[str]) -> str:
        rows = [row for name in block["files"].split() for row in read_rows(document.parent / name)]
        return f"{block['head']}\n{render(rows)}\n{block['tail']}"

    return _BLOCK.sub(rendered, text)


def fill(document: Path) -> None:
    """Renders the blocks of ``document`` in place; see :func:`filled`."""
    part = document.with_name(f"{document.name}.part")
    part.write_text(filled(document), encoding="utf-8")
    part.replace(document)


def _caption(environment: Environment, rows: Iterable[Row]) -> str:
    clocks = sorted({row.timing.clock_mhz for row in rows if row.timing and row.timing.clock_mhz})
    versions = {name: getattr(environment, name) for name in ("torch", "timm", "triton", "numba")}
    parts = [
        environment.device,
        *([f"{clocks[0]} to {clocks[-1]} MHz"] if clocks else []),
        f"{environment.threads} threads",
        *(f"{name} {version}" for name, version in versions.items() if version),
        f"commit {environment.commit}",
    ]
    return ", ".join(parts) + "."


def _operator_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Those that were measured beside a copy have its share of the bandwidth in a column of their own."""
    copies = {_copied(row): row.gb_per_s for row in rows if row.subject == COPY and row.timing}
    column, rule = (" of copy |", "---:|") if copies else ("", "")
    yield f"| operator | case | dtype | direction | median ms (p20 to p80) | GB/s |{column} error | peak MiB |"
    yield f"|---|---|---|---|---:|---:|{rule}---:|---:|"
    for row in rows:
        assert row.accuracy is not None
        share = f"{row.gb_per_s / copies[_copied(row)]:.0%}" if _copied(row) in copies else ""
        yield (
            f"| {row.subject} | {row.case} | {row.dtype} | {row.direction} | {_times(row)} "
            f"| {_rate(row, 'gb_per_s')} |{f' {share} |' * bool(copies)} {row.accuracy.error:.1e} | {_memory(row)} |"
        )


def _copied(row: Row) -> tuple[str, str, str]:
    """What a row of an operator and that of its copy have in common; as a CUDA graph it moves the same bytes."""
    return row.case.partition(", ")[0], row.dtype, row.direction


def _model_lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| model | batch x side | dtype | direction | median ms (p20 to p80) | images/s | peak MiB |"
    yield "|---|---|---|---|---:|---:|---:|"
    for row in rows:
        yield (
            f"| {row.subject} | {row.batch} x {row.case} | {row.dtype} | {row.direction} | {_times(row)} "
            f"| {_rate(row, 'samples_per_s')} | {_memory(row)} |"
        )


def _clip_lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| model | clips x case | dtype | direction | median ms (p20 to p80) | frames/s | state KiB | peak MiB | |"
    yield "|---|---|---|---|---:|---:|---:|---:|---|"
    for row in rows:
        assert row.clip is not None
        state = "" if row.clip.state_bytes is None else f"{row.clip.state_bytes / 2**10:.0f}"
        yield (
            f"| {row.subject} | {row.batch} x {row.case} | {row.dtype} | {row.direction} | {_times(row)} "
            f"| {_rate(row, 'frames_per_s')} | {state} | {_memory(row)} | {row.note} |"
        )


def _rate(row: Row, name: str) -> str:
    return f"{getattr(row, name):.3g}" if row.timing else ""


def _times(row: Row) -> str:
    timing = row.timing
    return f"{timing.median_ms:.4g} ({timing.p20_ms:.4g} to {timing.p80_ms:.4g})" if timing else ""


def _memory(row: Row) -> str:
    return "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
