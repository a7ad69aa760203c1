"""Print what a model costs: parameters, multiply-adds with the scans counted, memory kept for the backward, time.

Examples:
  vision-ssm profile vmamba_tiny
  vision-ssm profile vim_tiny swin_tiny_patch4_window7_224 --batch 8 --device cuda
"""

import argparse
from collections.abc import Sequence

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table

    from vision_ssm.engine.benchmark.profile import CONVENTION, profile

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    headings = ("params (M)", "mult-adds (G)", "% scans", "MiB kept", "ms infer", "ms step")
    words = {heading: max(map(len, heading.split())) for heading in headings}  # whole, in a terminal of 80 columns too
    numbers = (Column(heading, justify="right", min_width=width) for heading, width in words.items())
    table = Table(Column("model", no_wrap=True), *numbers, box=None, padding=(0, 1, 0, 0))
    console = Console()
    for name in track(args.models, description="measuring", console=console, transient=True):
        costs = profile(name, size=args.size, batch=args.batch, device=device, seconds=args.seconds)
        table.add_row(
            name,
            f"{costs.parameters / 1e6:.2f}",
            f"{costs.multiply_adds / 1e9:.3f}",
            f"{100 * costs.scanned:.0f}",
            f"{costs.kept_mib:.0f}",
            f"{costs.forward_ms:.4g}",
            f"{costs.step_ms:.4g}",
        )
    console.print(CONVENTION)
    console.print(
        f"Batch {args.batch}, {args.size} px, float32, {device.type}, torch {torch.__version__}; median times."
    )
    console.print(table)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help="timm names, this package's or others")
    p.add_argument("--size", type=int, default=224, help="side of the images in pixels, 224 by default")
    p.add_argument("--batch", type=int, default=1, help="images of a run, 1 by default")
    p.add_argument("--seconds", type=float, default=2.0, help="time for each of the two measurements, 2 by default")
    p.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
