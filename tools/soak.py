"""Train for many steps on images of ever other sizes, and say whether numbers, memory and compilation stay in order.

The exit status is 1 if a loss or a weight was not finite, memory grew, or steps were compiled again and again. --out
writes what was seen as JSON.

Examples:
  vision-ssm soak --steps 2000 --out soak.json
  vision-ssm soak test_vmamba --steps 40 --sizes 8 40 --batch 1 --device cpu
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from dataclasses import asdict

    import torch
    from rich.console import Console

    from vision_ssm.engine.benchmark.soak import soak
    from vision_ssm.engine.checkpoint import write_json

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"steps": args.steps, "sizes": tuple(args.sizes), "batch": args.batch, "compiled": args.compile}
    seen = soak(args.backbone, device=device, **options)
    complaints = seen.complaints()
    if args.out:
        write_json(args.out, {**asdict(seen), "complaints": complaints})
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{seen.steps} steps of {seen.distinct_sizes} sizes on {seen.environment.device}")
    for name in ("loss", "memory_mib", "median_ms", "slow_steps", "graphs"):
        console.print(f"{name:12}" + "".join(f"{value:10.4g}" for value in getattr(seen, name)))
    console.print("; ".join(complaints) or "all in order")
    return 1 if complaints else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("backbone", nargs="?", default="vmamba_tiny", help="timm name, vmamba_tiny by default")
    p.add_argument("--steps", type=int, default=2000, help="training steps, 2000 by default")
    p.add_argument("--sizes", type=int, nargs=2, default=[32, 256], metavar="SIDE", help="in pixels, 32 to 256")
    p.add_argument("--batch", type=int, default=4, help="images of a step, 4 by default")
    p.add_argument("--compile", metavar="BACKEND", help="compile once for all sizes, such as by aot_eager")
    p.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write what was seen")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
