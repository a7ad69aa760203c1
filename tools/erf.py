"""Draw the effective receptive field of a model: how much each pixel moves the centre of the last feature map.

Without a checkpoint only the network before training is drawn, averaged over random initialisations. Areas are those of
the smallest square about the centre that holds 20, 50 and 99 % of the gradient; they are written as JSON beside the
picture.

Examples:
  vision-ssm erf vmamba_tiny photo.jpg
  vision-ssm erf vmamba_tiny photos/ --checkpoint vmamba_tiny.safetensors --out vmamba_tiny.png
  vision-ssm erf swin_tiny_patch4_window7_224 photos/ --size 448 --samples 50
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.tools.errors import debug_option, run


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    import torch
    from rich.console import Console

    from vision_ssm.engine import erf
    from vision_ssm.engine.erf import receptive_fields
    from vision_ssm.engine.figures import save_figure

    picture, areas = erf.outputs(args.out or Path(f"{args.model}_erf.png"), overwrite=args.overwrite)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    images = erf.pictures(args.image, args.model, size=args.size, most=args.samples)
    after = {}
    if args.checkpoint:  # first, since it may not fit
        torch.manual_seed(args.seed)
        after = {"trained": erf.trained(args.model, images, args.samples, device, args.checkpoint)}
    torch.manual_seed(args.seed)
    fields = {"before training": erf.initial(args.model, images, args.samples, device), **after}
    for title, field in fields.items():
        shares = ", ".join(f"{part} of the gradient in {area:.2%} of the area" for part, area in field.areas().items())
        console.print(f"{title}: {shares}")
    save_figure(picture, receptive_fields(fields, f"{args.model}, {args.size} px"))
    source = str(args.checkpoint) if args.checkpoint else None
    about = {"model": args.model, "size": args.size, "seed": args.seed, "checkpoint": source}
    erf.write_areas(areas, fields, about)
    console.print(f"wrote {picture} and {areas}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vision-ssm erf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug_option()],
    )
    p.add_argument("model", metavar="MODEL", help="timm name, this package's or another")
    p.add_argument("image", type=Path, metavar="IMAGE", help="a picture, or a folder of pictures")
    p.add_argument("--checkpoint", type=Path, help="trained weights, drawn beside the network before training")
    p.add_argument("--size", type=int, default=224, help="side of the images in pixels, 224 by default")
    p.add_argument("--samples", type=int, default=20, help="gradients to average, 20 by default")
    p.add_argument("--out", type=Path, help="picture to write, MODEL_erf.png by default")
    p.add_argument("--overwrite", action="store_true", help="replace the picture and its JSON if they exist")
    p.add_argument("--seed", type=int, default=0, help="seed of the initialisations")
    p.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    return p


if __name__ == "__main__":
    raise SystemExit(run(main))
