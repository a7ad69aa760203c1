"""A label map for a new volume, on the volume's own grid."""

from pathlib import Path

import nibabel
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

from vision_ssm.data.volumes import read_volume
from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.config import build, config_name
from vision_ssm.engine.figures import overlays, save_figure
from vision_ssm.engine.runner import device

__all__ = ["label_volume", "predict_file"]


def predict_file(config: Config, task: BaseModel, source: Path, target: Path, *, overwrite: bool = False) -> Path:
    """Labels ``source`` and writes the map to ``target`` and an overlay of both to a PNG beside it.

    Args:
        source: NIfTI volume.
        target: a path that ends in .nii or .nii.gz.
        overwrite: replace files that exist.

    Returns:
        Path of the overlay.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is off.
        FileNotFoundError, ValueError: the volume is missing or unreadable, ``target`` is no NIfTI name, its folder is
            missing, or the config does not segment volumes.
    """
    suffix = next((suffix for suffix in (".nii.gz", ".nii") if target.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"output {target} must end in .nii or .nii.gz")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}; create it first")
    picture = target.with_name(target.name.removesuffix(suffix) + ".png")
    if existing := [str(path) for path in (target, picture) if path.exists() and not overwrite]:
        raise FileExistsError(f"{' and '.join(existing)} exist; choose another output or pass --overwrite")

    voxels, affine = read_volume(source)
    labels = label_volume(config, task, source)
    image = nibabel.Nifti1Image(labels, affine)
    write_atomically(target, lambda partial: nibabel.save(image, partial))
    save_figure(picture, overlays(voxels, {"prediction": labels}, tuple(config.classes)))
    return picture


@torch.no_grad()
def label_volume(config: Config, task: BaseModel, source: Path) -> np.ndarray:
    """Classes (x, y, z) as uint8 on the grid of the file ``source``.

    Raises:
        ValueError: the config has no ``prepare``, so it does not segment volumes.
    """
    if "prepare" not in config:
        raise ValueError(f"config {config_name(config)} does not segment volumes; predict needs one that does")
    prepare = Compose(build(config.prepare))
    item = prepare({"image": source})
    labels = task.label_map(item["image"].as_tensor()[None].to(device()))[0].cpu()
    item["label"] = MetaTensor(labels, affine=item["image"].affine, applied_operations=item["image"].applied_operations)
    invert = Invertd(keys="label", transform=prepare, orig_keys="image", nearest_interp=True)
    return invert(item)["label"][0].numpy().round().astype(np.uint8)
