"""Label volumes or cines, go on with a clip, or say what it shows, as the task of the config is.

Volumes: IN is a .nii or .nii.gz file, the folder of one DICOM series, or a folder of such files and folders; in it,
NAME_0000, NAME_0001, ... are channels of one case, as are the files in a folder. OUT is a .nii or .nii.gz file for one
case, or a folder. The maps lie on the volumes' own grids; beside them go an overlay of each (.png) and a table of
volumes in millilitres (.csv). A folder that is half done goes on where it was; the exit status is 1 if a case failed.

Clips: IN is a video, or a clip in an array (.npy), (t, h, w) or (t, k, h, w). Its first frames, as many as the config's
context, are gone on from. OUT is a video (.mp4, .gif, .mkv) of the frames that follow; beside it goes a sheet of frames
of the context, true ones and generated ones (.png). If the task is to classify clips, OUT is a .json file of classes
and their probabilities.

Cines: as volumes, of NIfTI files of four axes, the last of them time; a case in a folder of its own is the file whose
name ends as the config's modalities say. Every frame is labelled. The overlay is of two frames, and the table has each
frame's volumes, the largest and smallest marked.

Examples:
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors in.nii.gz out.nii.gz
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors series/ out.nii.gz --flips xy
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors cases/ labels/ --probabilities
  vision-ssm predict video/moving_digits_convs5_nano runs/digits/weights.safetensors in.mp4 out.mp4 --frames 1000
  vision-ssm predict video/moving_digits_heading runs/heading/weights.safetensors in.mp4 classes.json
  vision-ssm predict video/acdc_cine_unet runs/cine/weights.safetensors cine.nii.gz labels.nii.gz
  vision-ssm predict video/acdc_cine_unet runs/cine/weights.safetensors ACDC/database/testing labels/ --flips xy
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import config_options, debug_option, run

SOME = ("probabilities", "flips", "frames", "actions", "fps")  # options that only some tasks take; absent unless given


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.commands import PREDICTIONS, call
    from vision_ssm.engine.config import load_config

    config = load_config(args.config, args.set, safe=args.safe)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    paths = (args.checkpoint, args.source, args.target)
    options = {name: value for name, value in vars(args).items() if name in SOME}
    status: int = call(PREDICTIONS, config, *paths, console=console, overwrite=args.overwrite, options=options)
    return status


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[config_options(), debug_option()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("checkpoint", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of that config")
    p.add_argument("source", type=Path, metavar="IN", help="volume, DICOM series, cine, or folder of cases; or clip")
    p.add_argument("target", type=Path, metavar="OUT", help="label map to write (.nii, .nii.gz), folder, video, .json")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist, and label finished cases anew")
    volumes = p.add_argument_group("volumes and cines", argument_default=argparse.SUPPRESS)
    volumes.add_argument("--probabilities", action="store_true", help="also write the probability of every class")
    volumes.add_argument(
        "--flips", nargs="?", const="xyz", metavar="AXES", help="average over flips; xyz if no axes follow"
    )
    clips = p.add_argument_group("clips", argument_default=argparse.SUPPRESS)
    clips.add_argument("--frames", type=int, metavar="N", help="how many to generate; as IN has left by default")
    clips.add_argument("--actions", type=Path, metavar="FILE.npy", help="an integer a frame, the context's first")
    clips.add_argument("--fps", type=float, help="frames per second of OUT, 10 by default")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
