"""MONAI Bundles: a trained network with all that labels a new volume, in the format that MONAI's tools read.

The transforms, the network and the inferer are those of the config, written in MONAI's own configuration language, so a
bundle needs this package where it is used, and neither mmengine nor the config.
"""

import ast
import importlib.metadata
import json
import pkgutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from mmengine.config import Config
from monai.bundle import ConfigParser
from torch import nn

from vision_ssm.engine.checkpoint import load_into, read_state, write_atomically
from vision_ssm.engine.config import config_name, resolve, settings

__all__ = ["About", "create_bundle"]

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
PACKAGES = ("vision-ssm", "timm", "nibabel", "pytorch-ignite")  # that a bundle runs with, beside torch, numpy and MONAI
EXPRESSIONS = ("$", "@", "%")  # with which MONAI's references and expressions begin
COMMANDS = """
python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER
python -m monai.bundle run --config_file configs/inference.json --datalist "['one.nii.gz', 'another.nii.gz']"
python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json
python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json \\
  --config_file configs/inference.json
python -m monai.bundle ckpt_export network_def --filepath models/model.ts --ckpt_file models/model.pt \\
  --meta_file configs/metadata.json --config_file configs/inference.json
vision-ssm train configs/train.py
"""


WORKFLOW: Mapping[str, Any] = {
    "imports": ["$from pathlib import Path", "$from vision_ssm.engine.segmentation.cases import find_cases"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/data'",
    "output_dir": "$@bundle_root + '/eval'",
    "cases": "$[[str(path) for path in case.images()] for case in find_cases(Path(@dataset_dir), @modalities)]",
    "datalist": "$[images if len(images) > 1 else images[0] for images in @cases]",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network": "$@network_def.to(@device)",
    "dataset": {
        "_target_": "monai.data.Dataset",
        "data": "$[{'image': images} for images in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
    "postprocessing": {
        "_target_": "monai.transforms.Compose",
        "transforms": [
            {"_target_": "monai.transforms.Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "monai.transforms.Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "image",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "monai.transforms.AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "monai.transforms.SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_postfix": "labels",
                "output_dtype": "$numpy.uint8",
                "separate_folder": False,
                "resample": False,
            },
        ],
    },
    "handlers": [
        {
            "_target_": "monai.handlers.CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
        }
    ],
    "evaluator": {
        "_target_": "monai.engines.SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "run": ["$@evaluator.run()"],
}
"""What every bundle's inference.json holds; the entries that it refers to and lacks come from the config."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a bundle says of itself and no config knows.

    Attributes:
        version: of the model.
        authors: who trained it.
        modality: of the images, such as MR or CT.
    """

    version: str = "0.1.0"
    authors: str = "not stated"
    modality: str = "n/a"


def create_bundle(config: Config, checkpoint: Path, target: Path, about: About) -> None:
    """Writes a bundle to the new folder ``target``, all of it or nothing.

    The network is built from the bundle's own description, and labels one window before anything is written.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: there is no checkpoint, or no folder to hold ``target``.
        ValueError: the config does not segment volumes or cannot be written in MONAI's language, or the checkpoint
            belongs to another model.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; choose a new folder for the bundle")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}; create it first")
    inference = inference_config(config)
    net = ConfigParser({"network_def": inference["network_def"]}).get_parsed_content("network_def")
    load_into(net, read_state(checkpoint), checkpoint)
    metadata = describe(config, net.eval(), about)
    contents: dict[str, Callable[[Path], object]] = {
        "LICENSE": text(licence()),
        "configs/inference.json": text(json.dumps(inference, indent=4) + "\n"),
        "configs/metadata.json": text(json.dumps(metadata, indent=4) + "\n"),
        "configs/train.py": lambda path: path.write_text(f"{docstring(config)!r}\n{config.pretty_text}"),
        "docs/README.md": text(readme(target.name, metadata)),
        "models/model.pt": lambda path: torch.save(net.state_dict(), path),
    }
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as beside:
        bundle = Path(beside, target.name)
        for name, write in contents.items():
            (bundle / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(bundle / name, write)
        bundle.rename(target)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8")


def inference_config(config: Config) -> dict[str, Any]:
    """MONAI's configuration of the evaluator that labels the NIfTI files of ``dataset_dir``.

    Raises:
        ValueError: the config does not segment volumes, or an entry has no place in MONAI's language.
    """
    entries = settings(config)
    model = entries.get("model", {})
    if "prepare" not in entries or not {"net", "inferer"} <= set(model):
        raise ValueError(
            f"config {config_name(config)} does not segment volumes: a bundle needs its entries prepare, model.net and "
            "model.inferer"
        )
    net = dict(model["net"])
    if "pretrained" in net:
        net["pretrained"] = False  # models/model.pt replaces those weights
    return {
        **WORKFLOW,
        "modalities": translate(entries.get("modalities", ())),
        "network_def": translate(net),
        "preprocessing": {"_target_": "monai.transforms.Compose", "transforms": translate(entries["prepare"])},
        "inferer": translate(model["inferer"]),
    }


def translate(node: Any) -> Any:
    """A config entry as MONAI's ConfigParser reads it: objects by their dotted names, tuples as lists.

    Raises:
        ValueError: an object without a name, or a text that MONAI would evaluate.
    """
    if isinstance(node, Mapping):
        entries = {key: translate(value) for key, value in node.items() if key != "type"}
        return {"_target_": dotted_name(resolve(node["type"])), **entries} if "type" in node else entries
    if isinstance(node, (list, tuple)):
        return [translate(value) for value in node]
    if callable(node):
        return {"_target_": dotted_name(node), "_mode_": "callable"}
    if isinstance(node, str) and node.startswith(EXPRESSIONS):
        raise ValueError(
            f"the config holds the text {node!r}, which MONAI would evaluate; write it without {node[0]!r}"
        )
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise ValueError(f"the config holds {node!r}, which no JSON file can; describe it as dict(type=...)")


def dotted_name(target: Callable[..., Any]) -> str:
    """The shortest name that an object is imported by, as in ``monai.transforms.Orientationd``.

    Raises:
        ValueError: there is none.
    """
    packages = str(target.__module__).split(".")
    for depth in range(1, len(packages) + 1):
        package = ".".join(packages[:depth])
        try:
            if pkgutil.resolve_name(f"{package}:{target.__qualname__}") is target:
                return f"{package}.{target.__qualname__}"
        except (AttributeError, ImportError, ValueError):
            continue
    raise ValueError(f"{target!r} cannot be imported by name, so MONAI cannot build it; define it in a module")


def describe(config: Config, net: nn.Module, about: About) -> dict[str, Any]:
    """The bundle's metadata; channels, types and shapes are those of a window that the network labels.

    Raises:
        ValueError: see ``data_format``.
    """
    classes = dict(enumerate(("background", *config.classes)))
    formats = data_format(config, net, about.modality)
    return {
        "schema": SCHEMA,
        "version": about.version,
        "changelog": {about.version: f"made from {config_name(config)}"},
        "monai_version": released(monai.__version__),
        "pytorch_version": released(torch.__version__),
        "numpy_version": released(np.__version__),
        "required_packages_version": {name: installed(name) for name in PACKAGES},
        "task": f"Segmentation of {', '.join(config.classes)}",
        "description": docstring(config),
        "authors": about.authors,
        "copyright": f"Copyright (c) {about.authors}",
        "data_source": f"see the config {config_name(config)}",
        "data_type": "nifti",
        "image_classes": ", ".join(formats["inputs"]["image"]["channel_def"].values()),
        "label_classes": ", ".join(f"{value} {name}" for value, name in classes.items()),
        "pred_classes": f"{len(classes)} channels of logits, background first",
        "eval_metrics": {},
        "intended_use": "Research; no medical device",
        "references": [],
        "network_data_format": formats,
    }


@torch.no_grad()
def data_format(config: Config, net: nn.Module, modality: str) -> dict[str, Any]:
    """What goes into the network and comes out of it, as MONAI's metadata describe it.

    Raises:
        ValueError: the config does not state ``in_channels`` of the network or ``roi_size`` of the inferer, or the
            network gives other classes than the config names.
    """
    channels, window = config.model.net.get("in_channels"), config.model.inferer.get("roi_size")
    if channels is None or not isinstance(window, Sequence):
        raise ValueError(
            f"config {config_name(config)} must state model.net.in_channels and the sides of model.inferer.roi_size; "
            f"got {channels!r} and {window!r}"
        )
    if not all(isinstance(side, int) and side > 0 for side in window):
        raise ValueError(f"model.inferer.roi_size must be positive along every axis for a bundle; got {window!r}")
    classes = ("background", *config.classes)
    logits = net(torch.zeros(1, channels, *window))
    if logits.shape != (1, len(classes), *window):
        raise ValueError(
            f"the network gives logits of shape {tuple(logits.shape)} for a window of {tuple(window)}; "
            f"{len(classes)} classes need {(1, len(classes), *window)}"
        )

    def tensor(names: Sequence[str], dtype: str, **about: str) -> dict[str, Any]:
        return {
            "type": "image",
            "spatial_shape": list(window),
            "value_range": [],
            "is_patch_data": True,
            **about,
            "num_channels": len(names),
            "dtype": dtype,
            "channel_def": {str(channel): name for channel, name in enumerate(names)},
        }

    image = tensor(channel_names(config, channels), "float32", format="magnitude", modality=modality)
    pred = tensor(classes, str(logits.dtype).removeprefix("torch."), format="segmentation")
    return {"inputs": {"image": image}, "outputs": {"pred": pred}}


def channel_names(config: Config, channels: int) -> list[str]:
    """What the network's channels hold; their numbers where the config's modalities are none of them."""
    modalities = [name if isinstance(name, str) else name[0] for name in config.get("modalities", ())]
    return modalities if len(modalities) == channels else [f"channel {number}" for number in range(channels)]


def installed(package: str) -> str:
    """Version of a package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"a bundle runs with {package}, which is not installed; pip install 'vision-ssm[bundle]'"
        ) from None


def released(version: str) -> str:
    """A version without the build that it is of."""
    return str(version).partition("+")[0]


def docstring(config: Config) -> str:
    """What the config's file says of itself; its name if it says nothing."""
    return ast.get_docstring(ast.parse(Path(config.filename).read_text(encoding="utf-8"))) or config_name(config)


def licence() -> str:
    """Text of this package's licence, as it was installed with."""
    found = importlib.metadata.files("vision-ssm") or ()
    return next(file for file in found if file.name == "LICENSE").read_text(encoding="utf-8")


def readme(name: str, metadata: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{package} {version}" for package, version in metadata["required_packages_version"].items())
    return f"""# {name}

{metadata["description"]}

Label maps hold {metadata["label_classes"]}. They lie on the grid of their volume, in `eval`. A case is a NIfTI file, or
a file for each of its channels: {metadata["image_classes"]}.

Made with MONAI {metadata["monai_version"]}, PyTorch {metadata["pytorch_version"]}, {packages}. In this folder:

```shell
{COMMANDS.strip()}
```

ONNX has no operator for the scans of state-space models, so MONAI's `onnx_export` works for networks without them
alone; `vision-ssm export --to onnx` writes the scans in plain operators. The network was trained by vision_ssm and not
by MONAI's trainer: `configs/train.py` is its config. LICENSE is that of the code; what applies to the weights depends
on the data that they were trained on as well. Nothing here is a medical device.
"""
