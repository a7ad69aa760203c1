"""Label a NIfTI volume; the map lies on the volume's grid, and a picture of both is written beside it.

Example:
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors in.nii.gz out.nii.gz
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.evaluate import load_task
    from vision_ssm.engine.predict import predict_file

    config = load_config(args.config, args.set)
    task = load_task(config, args.checkpoint)
    picture = predict_file(config, task, args.source, args.target, overwrite=args.overwrite)
    Console().print(f"labels:  {args.target}\noverlay: {picture}", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("checkpoint", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of that config")
    p.add_argument("source", type=Path, metavar="IN", help="volume to label: .nii or .nii.gz")
    p.add_argument("target", type=Path, metavar="OUT", help="label map to write: .nii or .nii.gz")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override config entries, as in training")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
