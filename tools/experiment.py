"""Train networks under one budget, test them, and render the comparison from the lines that it leaves.

Runs that the file holds are not made again: repeat the command to go on. Several processes may share a file, each with
a share of the runs, on one GPU each; on one GPU together they would take each other's time.

Examples:
  vision-ssm experiment run experiment/deep_grey --out deep_grey.jsonl --seconds 20
  vision-ssm experiment run experiment/ct_abdomen --out ct.jsonl --seconds 20 --share 0/4 --set data_root=ct_abdomen_3mm
  vision-ssm experiment render deep_grey.jsonl ct.jsonl --figure comparison.png
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return render(args) if args.command == "render" else perform(args)


def perform(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.experiment import runs

    console = Console(highlight=False, soft_wrap=True)
    config = load_config(args.config, args.set, safe=args.safe)
    jobs = runs.jobs(config, seeds=args.seeds, seconds=args.seconds, networks=args.networks, share_of=args.share)
    failed, late = runs.perform(config, jobs, args.out, limit=args.limit, report=console.print)
    console.print(f"{args.out} holds {len(jobs) - len(failed) - len(late)} of {len(jobs)} runs")
    if late:
        console.print(f"no time for {len(late)}; repeat the command to go on")
    return 1 if failed else 0


def render(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_ssm.engine.experiment.comparison import compare, render
    from vision_ssm.engine.experiment.runs import read_runs
    from vision_ssm.engine.figures import save_figure

    runs = [run for file in args.files for run in read_runs(file)]
    Console(highlight=False, markup=False, soft_wrap=True).print(render(runs))
    if args.figure:
        save_figure(args.figure, compare(runs))
    return 0


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        prog="vision-ssm experiment", description=__doc__, formatter_class=formatter, parents=[debug_option()]
    )
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="make the runs that a file lacks", parents=[config_options()])
    one.add_argument("config", help="a config with entrants, such as experiment/deep_grey")
    one.add_argument("--out", type=Path, required=True, help="file of runs, one JSON object a line; made or continued")
    one.add_argument("--seconds", type=float, required=True, help="training time of each run")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2 by default")
    one.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="some of the entrants; all by default")
    one.add_argument("--share", default="0/1", metavar="I/N", help="only this process's share of the runs, such as 0/4")
    one.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="begin no run that ends later")
    two = commands.add_parser("render", help="print the tables, draw the figure")
    two.add_argument("files", nargs="+", type=Path, help="files of runs")
    two.add_argument("--figure", type=Path, help="picture to write, such as a .png")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
