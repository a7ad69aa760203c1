"""Make a MONAI Bundle of a trained segmentation network: one folder that MONAI's own tools run and verify.

Examples:
  vision-ssm bundle create medical/deep_grey_vmamba_unet runs/brain/weights.safetensors deep_grey
  vision-ssm bundle create medical/deep_grey_vmamba_unet runs/brain/weights.safetensors deep_grey --modality MR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.segmentation.bundle import About, create_bundle

    about = About(version=args.bundle_version, authors=args.authors, modality=args.modality)
    create_bundle(load_config(args.config, args.set, safe=args.safe), args.checkpoint, args.target, about)
    Console(highlight=False, markup=False).print(f"bundle: {args.target}", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    commands = p.add_subparsers(dest="command", required=True)
    creating = commands.add_parser("create", help="write a bundle to a new folder", parents=[config_options()])
    creating.add_argument("config", help="path of a config, or a name such as medical/deep_grey_vmamba_unet")
    creating.add_argument("checkpoint", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of that config")
    creating.add_argument("target", type=Path, metavar="OUT", help="new folder; its name is the bundle's")
    creating.add_argument("--bundle-version", default="0.1.0", metavar="VERSION", help="of the model, 0.1.0 by default")
    creating.add_argument("--authors", default="not stated", help="who trained it")
    creating.add_argument("--modality", default="n/a", help="of the images, such as MR or CT")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
