"""Says which class a clip in a file shows."""
# Shapes: t frames, k channels, h w a frame.

from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from vision_ssm.engine.checkpoint import write_json
from vision_ssm.engine.findings import origin
from vision_ssm.engine.outputs import require_outputs
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.clip_file import open_clip
from vision_ssm.engine.video.clips import ClipClassification

__all__ = ["classify_file"]

PIECE = 64  # frames that are in memory at once


@torch.no_grad()
def classify_file(
    config: Config, checkpoint: Path, source: Path, target: Path, *, console: Console, overwrite: bool = False
) -> int:
    """Writes the class of a clip, by all of its frames, and the probability of each class; returns 0.

    The clip is read in pieces, with the state between, so that its length is not bound by memory.

    Args:
        source: see ``open_clip``.
        target: JSON file to write.
        overwrite: replace a file that exists.

    Raises:
        FileExistsError, PermissionError: ``target`` exists and ``overwrite`` is off, or its folder cannot be written.
        FileNotFoundError, ValueError: a file is missing or unreadable or of another model; the frames do not fit the
            network; or its output is not finite. Nothing is written then.
    """
    if target.suffix != ".json":
        raise ValueError(f"output {target} must end in .json, for classes and their probabilities")
    require_outputs([target], source, overwrite=overwrite)
    task = load_task(config, checkpoint)
    assert isinstance(task, ClipClassification)
    clip = open_clip(source, config, task.net.in_channels)
    state = None
    starts = range(0, clip.length, PIECE)
    for start in track(starts, "reading", console=console, disable=not console.is_terminal):
        frames = clip.read(range(start, min(start + PIECE, clip.length)))
        logits, state = task.net(frames[None].to(device()), state)
    chances = logits[0, -1].double().softmax(dim=0)
    if not chances.isfinite().all():
        raise ValueError(f"the network's output for {source} is not finite; check its weights")
    probabilities = dict(zip(config.classes, chances.tolist(), strict=True))
    found = max(probabilities, key=lambda name: probabilities[name])
    about = origin(config, checkpoint=checkpoint, source=source)
    write_json(target, {**about, "frames": clip.length, "class": found, "probabilities": probabilities})
    console.print(f"class: {found}, of probability {probabilities[found]:.3f}\nprobabilities: {target}")
    return 0
