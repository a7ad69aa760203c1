"""The quickstart: three networks trained on the embedded brain, compared, and shown."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from rich.console import Console

from vision_ssm._version import __version__
from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.engine.checkpoint import write_json
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.figures import curves, save_figure
from vision_ssm.engine.report import score_rows, write_report
from vision_ssm.engine.segmentation.overlays import Shown, overlays
from vision_ssm.engine.segmentation.predict import predict_file
from vision_ssm.engine.segmentation.predictor import Predictor
from vision_ssm.engine.training.build import prepare_folder
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.train import TrainingResult, train

__all__ = ["CONFIG", "run_demo"]

CONFIG = "medical/deep_grey_vmamba_unet"
NOTES = (
    "Six deep-grey structures in the T1 image of one person (Colin27), labelled by hand in the AAL atlas. The left "
    "hemisphere is the training set; the right one, mirrored, is the test set and was not trained on.",
    "One brain is a demonstration: the two halves of a head resemble each other far more than two people do, and a "
    "difference of a few hundredths between networks is within what another seed changes. The learning rates and the "
    "number of steps were chosen by looking at the tested half, as there is no third one.",
    "The identity twin is the same network with the state-space scan left out; the plain U-Net is MONAI's BasicUNet "
    "with the same data, loss and optimizer.",
)


@dataclass(frozen=True)
class Entrant:
    """A network of the comparison: the folder of its run, its title, and how it is configured."""

    folder: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()


ENTRANTS = (
    Entrant("ssm", "SSM U-Net", CONFIG),
    Entrant("identity", "identity twin", CONFIG, ("model.net.mixer=identity",)),
    Entrant("plain", "plain U-Net", "medical/deep_grey_basic_unet"),
)


def run_demo(
    folder: Path, *, console: Console, overrides: Sequence[str] = (), safe: bool = False
) -> dict[str, TrainingResult]:
    """Trains and tests every entrant, labels the whole brain with the first, and writes the report to ``folder``.

    Args:
        folder: new or empty.
        overrides: config entries changed for every entrant, such as ``train_cfg.max_iters=100``.
        safe: take overrides of plain data alone.

    Returns:
        Results by title.

    Raises:
        FileExistsError, PermissionError: see ``prepare_folder``.
    """
    prepare_folder(folder)
    configs = {
        entrant: load_config(entrant.config, (*entrant.overrides, *overrides), safe=safe) for entrant in ENTRANTS
    }
    results, tasks = {}, {}
    for entrant, config in configs.items():
        results[entrant.title], tasks[entrant.title] = train(
            config, folder / entrant.folder, console=console, title=entrant.title
        )
    config = configs[ENTRANTS[0]]
    brain = folder / "brain.nii.gz"
    shutil.copyfile(deep_grey_files()[0]["image"], brain)
    predict_file(Predictor(config, tasks[ENTRANTS[0].title]), brain, folder / "prediction.nii.gz")

    rows = score_rows(results)
    comparison = compare(config, tasks)
    save_figure(folder / "report.png", comparison)
    losses = curves({title: result.losses for title, result in results.items()})
    figures = {"Truth and predictions on the unseen hemisphere": comparison, "Training loss": losses}
    write_report(folder / "report.html", title="vision_ssm quickstart", notes=NOTES, rows=rows, figures=figures)
    write_json(folder / "metrics.json", summary(results))
    return results


@torch.no_grad()
def compare(config: Config, tasks: dict[str, BaseModel]) -> Any:
    """Figure of the test volume under the true labels and under every task's."""
    item = build(config.test_dataloader.dataset)[0]
    image = item["image"]
    maps = {"truth": item["label"][0].numpy()}
    for title, task in tasks.items():
        maps[title] = task.label_map(image[None].to(device()))[0, 0].cpu().numpy()
    return overlays({"": Shown(image[len(image) // 2].numpy(), maps)}, tuple(config.classes))


def summary(results: dict[str, TrainingResult]) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "notes": NOTES,
        "runs": {title: asdict(result) for title, result in results.items()},
    }
