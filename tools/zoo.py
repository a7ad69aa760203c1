"""List the published checkpoints, fetch one, convert an official file to safetensors, or verify either.

Examples:
  vision-ssm zoo list
  vision-ssm zoo list vim
  vision-ssm zoo list 'vmamba_tiny*'
  vision-ssm zoo fetch vim_tiny --sha256 HEX
  vision-ssm zoo convert vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny.safetensors
  vision-ssm zoo verify vmamba_tiny.safetensors
  vision-ssm zoo render --into README.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from rich.console import Console

    from vision_ssm.engine.zoo import published

    console = Console(highlight=False, markup=False)
    if args.command == "list":
        published.print_cards(console, published.find_cards(args.which))
    elif args.command == "fetch":
        console.print(str(published.fetch(args.which, sha256=args.sha256, console=console)), soft_wrap=True)
    elif args.command == "convert":
        metadata = published.convert_file(args.source, args.target, model=args.model, overwrite=args.overwrite)
        lines = (f"{key:14} {value}" for key, value in {"wrote": args.target, **metadata}.items())
        console.print("\n".join(lines), soft_wrap=True)
    elif args.command == "verify":
        try:
            console.print(published.verify_file(args.file, model=args.model).report(), soft_wrap=True)
        except published.VerificationError as error:
            sys.stderr.write(f"vision-ssm: verification failed: {' '.join(str(error).split())}\n")
            return 1
    else:
        from vision_ssm.engine.zoo.models_table import fill

        fill(args.document)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    commands = p.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="what was published, and where")
    listing.add_argument("which", nargs="?", default="*", metavar="NAME", help="family, or pattern of model names")
    fetching = commands.add_parser("fetch", help="download an official file to the user's cache, checked by its hash")
    fetching.add_argument("which", metavar="NAME", help="model, or published file")
    fetching.add_argument("--sha256", metavar="HEX", help="what the file must have, where its authors state none")
    converting = commands.add_parser("convert", help="official file to safetensors")
    converting.add_argument("source", type=Path, metavar="OFFICIAL", help="file of the authors' release")
    converting.add_argument("target", type=Path, metavar="OUT", help="new .safetensors file")
    converting.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verifying = commands.add_parser("verify", help="check hash, keys and a forward pass; status 1 if one fails")
    verifying.add_argument("file", type=Path, metavar="FILE", help="official or converted file")
    for command in (converting, verifying):
        command.add_argument("--model", help="timm name; by default the one that the file is for")
    rendering = commands.add_parser("render", help="fill in the table of models of a document")
    rendering.add_argument("--into", dest="document", type=Path, required=True, help="document with a models block")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
