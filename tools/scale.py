"""Measure how training scales over processes, or compare what one process and several measured.

VMamba-T as replicas (DDP), SegMamba as replicas and as shards (FSDP); the same batch for every process.

Examples:
  torchrun --nproc-per-node 1 -m vision_ssm.tools scale measure one.jsonl
  torchrun --nproc-per-node 2 -m vision_ssm.tools scale measure two.jsonl
  vision-ssm scale compare one.jsonl two.jsonl
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "measure":
        measure(args.out, args.suite)
    else:
        compare(args.files)
    return 0


def measure(out: Path, suite: str) -> None:
    from rich.console import Console

    from vision_ssm.engine.benchmark import scale
    from vision_ssm.engine.training.device import group_left

    # torchrun: one voice for all processes
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
    with group_left():
        for row in scale.measure(suite, out):
            console.print(f"{row.subject} {row.case} on {row.processes} {row.dtype}: {row.samples_per_s:.4g} samples/s")
    console.print(f"wrote {out}")


def compare(files: Sequence[Path]) -> None:
    from rich.console import Console

    from vision_ssm.engine.benchmark.rows import read_rows
    from vision_ssm.engine.benchmark.scale import efficiencies

    console = Console(highlight=False, soft_wrap=True)
    for row, efficiency in efficiencies([row for file in files for row in read_rows(file)]):
        speed = f"{row.samples_per_s:.4g} samples/s, {efficiency:.1%}"
        console.print(f"{row.subject} {row.case} on {row.processes} {row.dtype}: {speed}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    commands = p.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="time training steps in the processes that were started")
    measuring.add_argument("out", type=Path, help="new file for the rows, one JSON object each")
    measuring.add_argument("--suite", default="scale", help="scale by default; scale_smoke is tiny")
    comparing = commands.add_parser("compare", help="efficiency of several processes")
    comparing.add_argument("files", nargs="+", type=Path, help="files of rows, of one process too")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
