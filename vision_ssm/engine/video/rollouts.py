"""How generated frames drift from those that came, frame by frame: numbers, a table and curves."""
# Shapes: n clips, f generated frames.

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vision_ssm.engine.checkpoint import write_atomically, write_json
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.findings import origin, print_files, print_numbers
from vision_ssm.engine.outputs import require_output
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.next_frame import QUALITIES, FramePrediction, Quality, unit
from vision_ssm.engine.video.perceptual import LPIPS_SIDE, ClipFeatures, NotMeasured, frechet_distance, lpips

__all__ = ["LABELS", "Drift", "draw_curves", "measure_rollouts"]

LABELS = {"mse": "MSE", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "fvd": "FVD"}


@dataclass(frozen=True)
class Drift:
    """Qualities of generated frames.

    Attributes:
        frames: quality -> (n, f).
        clips: distance of all clips at once.
        missing: what was not measured -> why.
    """

    frames: Mapping[str, np.ndarray]
    clips: Mapping[str, float]
    missing: Mapping[str, str]

    def curves(self) -> dict[str, np.ndarray]:
        """Means over clips, (f,)."""
        return {name: values.mean(axis=0) for name, values in self.frames.items()}

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.frames.items()} | dict(self.clips)

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes JSON, and beside it the curves as a table (.csv) and as a figure (.png)."""
        curves = self.curves()
        rows = np.stack(list(curves.values()), axis=1).tolist()

        def write_table(partial: Path) -> None:
            with partial.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["frame", *curves])
                table.writerows([number, *row] for number, row in enumerate(rows, start=1))

        write_atomically(path.with_suffix(".csv"), write_table)
        figure = Figure(figsize=(4.4 * len(curves), 3.4), layout="constrained")
        draw_curves(figure, {"": {name: curve[None] for name, curve in curves.items()}})
        save_figure(path.with_suffix(".png"), figure)
        size = dict(zip(("clips", "frames"), next(iter(self.frames.values())).shape, strict=True))
        listed = {name: curve.tolist() for name, curve in curves.items()}
        write_json(path, {**about, **size, "means": self.means(), "per_frame": listed, "not_measured": self.missing})


def measure_rollouts(
    config: Config, checkpoint: Path, *, console: Console, out: Path | None = None, features: Path | None = None
) -> None:
    """Prints how well a checkpoint goes on with the clips of its config's test set, and writes it if ``out`` is given.

    Args:
        out: JSON file; see ``Drift.write``.
        features: TorchScript file for FVD; see ``ClipFeatures``.

    Raises:
        FileNotFoundError, ValueError: see ``load_task``, ``require_output``, ``ClipFeatures`` and ``measure``.
    """
    require_output(out)
    extractor = None if features is None else ClipFeatures(features, device())
    task = load_task(config, checkpoint)
    assert isinstance(task, FramePrediction)
    drift = measure(config, task, console=console, extractor=extractor)
    print_numbers(console, {LABELS[name]: mean for name, mean in drift.means().items()})
    print_numbers(console, {LABELS[name]: f"not measured: {reason}" for name, reason in drift.missing.items()})
    if out is not None:
        drift.write(out, {**origin(config, checkpoint=checkpoint), "context": task.context})
        print_files(console, out, out.with_suffix(".csv"), out.with_suffix(".png"))


@torch.no_grad()
def measure(config: Config, task: FramePrediction, *, console: Console, extractor: ClipFeatures | None = None) -> Drift:
    """Generates the frames of every test clip after its context, one by one, and compares each with the true one.

    Raises:
        ValueError: no frame of a clip is left to predict, generated frames are not finite, or see ``ClipFeatures``.
    """
    loader = build_loader(config.test_dataloader)
    dataset: Any = loader.dataset
    length, _, *size = dataset[0]["video"].shape
    qualities, missing = available(min(size))
    found: dict[str, list[Tensor]] = {name: [] for name in qualities}
    features: list[tuple[Tensor, Tensor]] = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("generating", total=len(loader) * (length - task.context))
        for batch in loader:
            parts = {key: batch[key].to(device()) for key in ("video", "actions") if key in batch}
            clips, truth = [parts["video"][:, : task.context]], parts["video"][:, task.context :]
            curves: dict[str, list[Tensor]] = {name: [] for name in qualities}
            for frame, true in zip(task.rollout(**parts), truth.unbind(1), strict=True):
                for name, quality in qualities.items():
                    curves[name].append(quality(unit(frame), unit(true)))
                if extractor is not None:
                    clips.append(frame[:, None])
                progress.advance(bar)
            for name, values in curves.items():
                found[name].append(torch.stack(values, dim=1).cpu())
            if extractor is not None:
                pairs = zip(torch.cat(clips, dim=1).split(1), parts["video"].split(1), strict=True)
                features += [(extractor(one), extractor(true)) for one, true in pairs]
    drift = {name: torch.cat(values).numpy() for name, values in found.items()}
    if lost := int((~np.isfinite(drift["mse"])).sum()):
        raise ValueError(f"{lost} of {drift['mse'].size} generated frames are not finite; check the weights")
    if extractor is None:
        return Drift(drift, {}, {**missing, "fvd": "needs a feature extractor, --features FILE"})
    sides = (torch.cat(side) for side in zip(*features, strict=True))
    return Drift(drift, {"fvd": frechet_distance(*sides)}, missing)


def available(side: int) -> tuple[dict[str, Quality], dict[str, str]]:
    """Qualities that can be measured on frames of this least side, and why others cannot."""
    qualities = dict(QUALITIES)
    try:
        if side < LPIPS_SIDE:
            raise NotMeasured(f"needs frames of {LPIPS_SIDE} x {LPIPS_SIDE} pixels or more")
        qualities["lpips"] = lpips(device())
    except NotMeasured as reason:
        return qualities, {"lpips": str(reason)}
    return qualities, {}


def draw_curves(part: FigureBase, curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """A panel for each quality: over the generated frames, the mean of each model's rows and how far they reach.

    Args:
        curves: model -> quality -> (n, f); a lone model may have no name.
    """
    names = list(next(iter(curves.values())))
    for axes, name in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for model, values in curves.items():
            rows = values[name]
            frames = np.arange(1, rows.shape[1] + 1)
            (line,) = axes.plot(frames, rows.mean(axis=0), label=model)
            axes.fill_between(
                frames, rows.min(axis=0), rows.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0
            )
        axes.set(xlabel="generated frame", ylabel=LABELS[name])
        axes.grid(alpha=0.3)
    if any(curves):
        part.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
