"""The command ``vision-ssm``.

Examples:
  vision-ssm quickstart
  vision-ssm train medical/deep_grey_vmamba_unet --work-dir runs/brain
  vision-ssm eval medical/deep_grey_vmamba_unet runs/brain/weights.safetensors
  vision-ssm predict medical/deep_grey_vmamba_unet runs/brain/weights.safetensors in.nii.gz out.nii.gz
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from vision_ssm._version import __version__
from vision_ssm.tools.errors import run

COMMANDS = {
    "quickstart": "train, test and show three networks on the embedded brain",
    "train": "train the model of a config",
    "eval": "measure a checkpoint on its config's test set",
    "predict": "label volumes: NIfTI files, DICOM series, folders of cases",
    "benchmark": "time operators and models",
    "scale": "time training steps in one process and several",
    "profile": "count parameters, multiply-adds and memory of models",
    "erf": "draw the effective receptive field of a model",
    "zoo": "list, convert and verify published checkpoints",
    "soak": "train on images of ever other sizes, and watch numbers and memory",
    "experiment": "train networks under one budget and compare them",
    "export": "write a model as one file that runs without this package",
    "bundle": "make a MONAI Bundle of a trained network",
}

_MODULES = {"profile": "profiling"}  # a profile.py beside the scripts would stand in for Python's own


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    chosen = parser().parse_args(arguments[:1])
    if chosen.command is None:
        parser().print_help()
        return 0
    return run(tool_of(chosen.command).main, arguments[1:])


def tool_of(command: str) -> ModuleType:
    """The module of a command; each is imported when it is called."""
    return importlib.import_module(f"vision_ssm.tools.{_MODULES.get(command, command)}")


def parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())
    p = argparse.ArgumentParser(
        prog="vision-ssm",
        description=f"commands:\n{listing}\n\n'vision-ssm COMMAND --help' says more.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"vision-ssm {__version__}")
    p.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
