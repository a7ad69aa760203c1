"""Train, test and show three networks on the embedded brain: an SSM U-Net, its identity twin, and a plain U-Net.

Examples:
  vision-ssm quickstart
  vision-ssm quickstart --work-dir runs/short --set train_cfg.max_iters=20
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run

NEXT = """
Report: {folder}/report.html   Numbers: {folder}/metrics.json

Next:
  vision-ssm predict {config} {folder}/ssm/weights.safetensors {folder}/brain.nii.gz {folder}/again.nii.gz
  vision-ssm eval {config} {folder}/ssm/weights.safetensors
  vision-ssm train {config} --work-dir {folder}/longer --set train_cfg.max_iters=1000
  vision-ssm train image/mnist_vmamba_nano --work-dir {folder}/digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    start = time.perf_counter()

    from rich.console import Console

    from vision_ssm.engine.demo import CONFIG, run_demo
    from vision_ssm.engine.report import print_scores

    console = Console()
    folder = args.work_dir or unused(Path("runs/quickstart"))
    results = run_demo(folder, console=console, overrides=args.set, safe=args.safe)
    print_scores(console, results)
    console.print(f"Whole quickstart: {time.perf_counter() - start:.0f} s")
    console.print(NEXT.format(folder=folder, config=CONFIG), soft_wrap=True, highlight=False)
    return 0


def unused(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist, so that nothing is overwritten."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[config_options(), debug_option()],
    )
    p.add_argument("--work-dir", type=Path, help="new folder for everything; runs/quickstart by default")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
