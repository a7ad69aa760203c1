"""Measure a checkpoint on its config's test set.

Examples:
  vision-ssm eval medical/deep_grey_vmamba_unet runs/brain/weights.safetensors
  vision-ssm eval medical/deep_grey_vmamba_unet runs/brain/iter_400.pth --out metrics.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.evaluate import evaluate, load_task
    from vision_ssm.engine.train import write_json

    config = load_config(args.config, args.set)
    scores = evaluate(config, load_task(config, args.checkpoint))
    console = Console()
    for metric, value in scores.items():
        console.print(f"{metric:24}{value:.4f}")
    if args.out:
        write_json(args.out, scores)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("checkpoint", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of that config")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override config entries, as in training")
    p.add_argument("--out", type=Path, help="also write the metrics to this JSON file")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
