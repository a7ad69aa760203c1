"""Measure a suite and write its rows as JSON lines, or render such files as Markdown tables or draw them.

Suites: cpu (VMamba-T beside Swin-T), ops (operators), models (inference and training; eager, compiled, compiled with
CUDA graphs), resolution (the same from 224 to 2048 px; compiled at two sizes only), volumes (3-D networks at 128^3),
video (training steps and generation), smoke (two minutes on a GPU). A long suite is run in pieces with --only; tables
take several files.

Examples:
  vision-ssm benchmark --suite smoke --out smoke.jsonl
  vision-ssm benchmark --suite video --only "train * 300 frames, eager" linear_scan --seconds 0.5 --out video_1.jsonl
  vision-ssm benchmark render smoke.jsonl
  vision-ssm benchmark render --into README.md
  vision-ssm benchmark plot resolution.jsonl --out resolution.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.command == "render":
        render_files(args.files, args.into)
    elif args.command == "plot":
        plot_files(args.files, args.picture)
    elif args.suite and args.out:
        measure(args.suite, args.out, args.device, args.only, args.seconds)
    else:
        arguments.error("give --suite and --out, or one of the commands render and plot")
    return 0


def measure(suite: str, out: Path, device: str | None, only: Sequence[str], seconds: float | None) -> None:
    from rich.console import Console

    from vision_ssm.engine import benchmark
    from vision_ssm.engine.benchmark.rows import write_rows

    console = Console(highlight=False, soft_wrap=True)
    for row in write_rows(benchmark.run(suite, device, only=only, seconds=seconds), out):
        time = f"{row.timing.median_ms:.4g} ms" if row.timing else row.note
        accuracy = f", error {row.accuracy.error:.1e}" if row.accuracy else ""
        console.print(f"{row.subject} {row.case} {row.dtype} {row.direction}: {time}{accuracy}")
    console.print(f"wrote {out}")


def render_files(files: Sequence[Path], document: Path | None) -> None:
    from rich.console import Console

    from vision_ssm.engine.benchmark.rows import fill, read_rows, render

    if not files and document is None:
        raise ValueError("render needs files of rows, or --into DOCUMENT")
    if document is not None:
        fill(document)
    for file in files:
        Console(highlight=False, markup=False, soft_wrap=True).print(render(read_rows(file)))


def plot_files(files: Sequence[Path], picture: Path) -> None:
    from vision_ssm.engine.benchmark.figure import resolution
    from vision_ssm.engine.benchmark.rows import read_rows
    from vision_ssm.engine.figures import save_figure

    save_figure(picture, resolution([row for file in files for row in read_rows(file)]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("--suite", help="what to measure")
    p.add_argument("--out", type=Path, help="new file for the rows, one JSON object each")
    p.add_argument(
        "--only", nargs="+", default=(), metavar="JOB", help="jobs with one of these labels; * stands for any text"
    )
    p.add_argument("--seconds", type=float, help="time for each row; by default the suite's own")
    p.add_argument("--device", help="cpu or cuda; by default the suite's own, else cuda if there is one")
    commands = p.add_subparsers(dest="command")
    rendering = commands.add_parser("render", help="print or fill in Markdown tables")
    rendering.add_argument("files", nargs="*", type=Path, help="files of rows, printed as tables")
    rendering.add_argument("--into", type=Path, help="document whose <!-- benchmark FILE --> blocks are rendered anew")
    plotting = commands.add_parser("plot", help="draw time and memory of models against tokens")
    plotting.add_argument("files", nargs="+", type=Path, help="files of rows")
    plotting.add_argument("--out", dest="picture", type=Path, required=True, help="picture to write, such as a .png")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
