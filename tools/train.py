"""Train the model of a config.

Examples:
  vision-ssm train medical/deep_grey_vmamba_unet --work-dir runs/brain
  vision-ssm train medical/deep_grey_vmamba_unet --work-dir runs/brain --resume
  vision-ssm train image/mnist_vmamba_nano --set train_cfg.max_iters=100 param_scheduler.0.eta_max=1e-3
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.config import config_name, load_config
    from vision_ssm.engine.report import print_scores
    from vision_ssm.engine.training.device import group_left
    from vision_ssm.engine.training.train import train

    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # torchrun: one voice for all processes
    config = load_config(args.config, args.set, safe=args.safe)
    work_dir = args.work_dir or Path("runs") / config_name(config)
    with group_left():
        result, _ = train(config, work_dir, console=console, title=config_name(config), resume=args.resume)
    print_scores(console, {config_name(config): result})
    console.print(f"weights: {work_dir / 'weights.safetensors'}", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option(), config_options()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("--work-dir", type=Path, help="folder of logs and checkpoints; runs/CONFIG by default")
    p.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="continue from the latest checkpoint in the folder; also: previous, the one before it, or a path",
    )
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
