"""Label volumes: a NIfTI file, a DICOM series or a folder of cases; the maps lie on the volumes' own grids.

IN is a .nii or .nii.gz file, the folder of one DICOM series, or a folder of such files and folders; in it, NAME_0000,
NAME_0001, ... are channels of one case, as are the files in a folder. OUT is a .nii or .nii.gz file for one case, or a
folder. Beside the label maps go an overlay of each (.png) and a table of volumes in millilitres (.csv). A folder that
is half done goes on where it was; the exit status is 1 if a case failed.

Examples:
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors in.nii.gz out.nii.gz
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors series/ out.nii.gz --flips xy
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors cases/ labels/ --probabilities
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.cases import nifti_suffix
    from vision_ssm.engine.config import load_config
    from vision_ssm.engine.evaluate import load_task
    from vision_ssm.engine.predict import predict_file, predict_folder
    from vision_ssm.engine.predictor import Predictor

    config = load_config(args.config, args.set)
    predictor = Predictor(config, load_task(config, args.checkpoint), flips=args.flips)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    options = {"probabilities": args.probabilities, "overwrite": args.overwrite}
    if nifti_suffix(args.target) or (args.target.suffix and not args.target.exists()):
        written = predict_file(predictor, args.source, args.target, **options)
        console.print(f"labels:  {written.labels}\noverlay: {written.overlay}\nvolumes: {written.volumes}")
        return 0
    batch = predict_folder(predictor, args.source, args.target, console=console, **options)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for case, reason in batch.failed.items():
        errors.print(f"vision-ssm: {case} failed: {reason}")
    counts = f"{len(batch.written)} labelled, {len(batch.kept)} kept from before, {len(batch.failed)} failed"
    console.print(f"{counts}; labels, overlays and volumes are in {args.target}")
    return 1 if batch.failed else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("config", help="path of a config, or a name under configs/ such as medical/deep_grey_vmamba_unet")
    p.add_argument("checkpoint", type=Path, help="weights (.safetensors) or a checkpoint (.pth) of that config")
    p.add_argument("source", type=Path, metavar="IN", help="file, DICOM series or folder of cases to label")
    p.add_argument("target", type=Path, metavar="OUT", help="label map to write (.nii or .nii.gz), or folder")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override config entries, as in training")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist, and label finished cases anew")
    p.add_argument("--probabilities", action="store_true", help="also write the probability of every class")
    p.add_argument(
        "--flips", nargs="?", default="", const="xyz", metavar="AXES", help="average over flips; xyz if no axes follow"
    )
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
