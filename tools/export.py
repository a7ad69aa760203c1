"""Write a trained model as one file that runs without this package.

MODEL is a backbone by its timm name, or the network of a config. Files are for any batch and any height and width from
32 to 512 pixels (--sides says otherwise; networks whose coarsest map has cells of 32 pixels begin at 33), unless
--fixed; a trace of TorchScript is always for one size. A file gets its name after it was read back and computed what
the model does.

Examples:
  vision-ssm export vmamba_tiny --to onnx --checkpoint vmamba_tiny.safetensors
  vision-ssm export vmamba_tiny --to aoti --checkpoint vmamba_tiny.safetensors --sides 64 1024
  vision-ssm export test_vmamba --to torchscript --random-weights --fixed --size 64 96
  vision-ssm export medical/deep_grey_vmamba_unet --to pt2 --checkpoint runs/brain/weights.safetensors --fixed
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run

KINDS = ("pt2", "aoti", "onnx", "torchscript")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.export.file import export
    from vision_ssm.engine.export.formats import FORMATS
    from vision_ssm.engine.export.subject import backbone, network
    from vision_ssm.engine.export.table import record

    if "/" in args.model or args.model.endswith(".py"):
        subject = network(load_config(args.model, args.set, safe=args.safe), args.checkpoint, args.size)
    else:
        subject = backbone(args.model, args.checkpoint, args.size)
    sides = tuple(args.sides) if args.sides else (max(32, subject.least), 512)
    path = args.out or Path(f"{Path(args.model).stem}{FORMATS[args.to].suffix}")
    with Console(stderr=True).status(f"exporting {args.model}; a large model takes minutes"):
        done = export(subject, path, args.to, None if args.fixed else sides)
    if args.record:
        record(args.record, subject, args.to, done)
    shapes = ", ".join("x".join(map(str, shape)) for shape in done.checked)
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"{done.path}: {done.scans} scans, {done.nodes} operators, {done.path.stat().st_size / 2**20:.1f} MiB\n"
        f"greatest difference from the model {done.error:.2g} of its largest output, on {shapes}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[config_options(), debug_option()],
    )
    p.add_argument("model", metavar="MODEL", help="timm name, path of a config, or its name with a slash in it")
    p.add_argument("--to", required=True, choices=KINDS, help="format of the file")
    weights = p.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights (.safetensors) or a checkpoint")
    weights.add_argument("--random-weights", action="store_true", help="a file to try out, which knows nothing")
    p.add_argument("--out", type=Path, metavar="FILE", help="by default named as the model, in this folder")
    p.add_argument("--fixed", action="store_true", help="for one image of one size: a smaller and faster program")
    p.add_argument("--size", type=int, nargs="+", default=(), metavar="N", help="of --fixed: height and width")
    p.add_argument("--sides", type=int, nargs=2, metavar=("LEAST", "MOST"), help="of images; 32 512 by default")
    p.add_argument("--record", type=Path, metavar="PAGE", help="keep the figures beside a document, and in its table")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
