"""Measure a checkpoint on its config's test set, or a folder of label maps against the truth.

Volumes are scored by Dice, by the 95th percentile of the distance between surfaces (HD95, mm) and by the share of the
surfaces within a tolerance (NSD), for every case and class; means come with 95 % bootstrap intervals over the cases. A
class that neither map holds is left out; so is the HD95 of one that only one of them holds, which is counted as missed
or invented. --out FILE.json also writes FILE.csv, the scores of each case, and FILE.png, the best, median and worst.
Each frame of a cine that has labels is a case. In the folder of the truth, NAME is of every frame of a cine, and
NAME_frame01 or NAME_frame01_gt of its first.

Clips are gone on from after the config's context, and every generated frame is compared with the true one: MSE, PSNR
and SSIM on values in [0, 1], and LPIPS where AlexNet's weights are on the disk; FVD of whole clips by --features. --out
FILE.json also writes FILE.csv and FILE.png, the curves over the frames.

Examples:
  vision-ssm eval medical/deep_grey_vmamba_unet runs/brain/weights.safetensors
  vision-ssm eval medical/deep_grey_vmamba_unet runs/brain/iter_400.pth --out metrics.json
  vision-ssm eval medical/deep_grey_vmamba_unet --labels labels/ --truth truth/ --images cases/ --out scores.json
  vision-ssm eval video/moving_digits_convs5_nano runs/digits/weights.safetensors --out rollouts.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run

SOME = ("tolerance", "features")  # options that only some tasks take; absent unless given


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_intermixed_args(argv)  # CHECKPOINT may follow options, although it may be absent
    if (args.checkpoint is None) == (args.labels is None) or (args.labels is None) != (args.truth is None):
        arguments.error("give a checkpoint, or --labels and --truth")

    from rich.console import Console

    from vision_ssm.engine.commands import COMPARISONS, MEASURES, call
    from vision_ssm.engine.config import load_config

    console = Console(soft_wrap=True, highlight=False)
    config = load_config(args.config, args.set, safe=args.safe)
    options = {name: value for name, value in vars(args).items() if name in SOME}
    paths = [args.labels, args.truth, args.images] if args.labels else [args.checkpoint]
    serving = COMPARISONS if args.labels else MEASURES
    call(serving, config, *paths, console=console, out=args.out, options=options)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[config_options(), debug_option()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("checkpoint", nargs="?", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of it")
    p.add_argument("--labels", type=Path, metavar="FOLDER", help="label maps to score in place of a checkpoint")
    p.add_argument("--truth", type=Path, metavar="FOLDER", help="true label maps of the same names")
    p.add_argument("--images", type=Path, metavar="FOLDER", help="images of the same names, for the figure")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write the scores here, and a table and figure beside")
    some = p.add_argument_group("of some tasks", argument_default=argparse.SUPPRESS)
    some.add_argument("--tolerance", type=float, metavar="MM", help="of NSD in millimetres, 1 by default")
    some.add_argument("--features", type=Path, metavar="FILE", help="TorchScript network of clips (n, 3, t, 224, 224)")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
