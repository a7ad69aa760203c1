"""Goes on with a clip: the frames that follow its beginning as a video, and a sheet of them beside the true ones."""
# Shapes: t frames, k channels, h w a frame.

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vision_ssm.engine.config import config_name
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.outputs import require_outputs
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.engine.video.clip_file import open_clip, read_array
from vision_ssm.engine.video.encoding import ENCODINGS, write_video
from vision_ssm.engine.video.next_frame import FramePrediction
from vision_ssm.engine.video.sheet import chosen, contact_sheet

__all__ = ["continue_file"]


def continue_file(
    config: Config,
    checkpoint: Path,
    source: Path,
    target: Path,
    *,
    console: Console,
    overwrite: bool = False,
    frames: int | None = None,
    actions: Path | None = None,
    fps: float = 10.0,
) -> int:
    """Writes the frames that a checkpoint generates after the first ``context`` ones of a clip; returns 0.

    Frames go to the file as they are generated, so that their number is not bound by memory.

    Args:
        source: a video, which is resized and cropped to the config's ``frame_size``; or an array (.npy) of bytes, or of
            numbers in [-1, 1], as large as the network takes it: (t, h, w) or (t, k, h, w).
        target: video to write, see ``write_video``; the contact sheet goes beside it (.png).
        overwrite: replace files that exist.
        frames: how many; by default as many as the clip has after the context.
        actions: a file (.npy) of integers, the action that leads to each frame, those of the context first.
        fps: frames per second of the video that is written.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is off.
        PermissionError: the folder of ``target`` cannot be written.
        FileNotFoundError, ValueError: a file is missing or unreadable or of another model; the clip is shorter than the
            context, or its frames do not fit the network; an action does not exist, or there are too few; a number of
            frames is needed. Nothing is written then.
    """
    if target.suffix.lower() not in ENCODINGS:
        raise ValueError(f"output {target} must be a video that ends in {', '.join(ENCODINGS)}")
    sheet = target.with_suffix(".png")
    require_outputs([target, sheet], source, overwrite=overwrite)
    task = load_task(config, checkpoint)
    assert isinstance(task, FramePrediction)
    clip = open_clip(source, config, task.net.channels)
    context = task.context
    if clip.length < context:
        raise ValueError(
            f"{source} has {clip.length} frames, the context of {config_name(config)} is {context}; give a longer "
            "clip, or --set model.context=N"
        )
    total = clip.length - context if frames is None else frames
    if total < 1:
        raise ValueError(f"{total} frames are to be generated; give --frames N, since {source} may have no more itself")
    known = None if actions is None else read_actions(actions, context + total)
    beginning = clip.read(range(context))
    after = {number: context + number for number in chosen(total)}
    truth = {number: clip.read(range(at, at + 1))[0] for number, at in after.items() if at < clip.length}
    stream = task.net.stream(beginning[None].to(device()), actions=known)
    steps = track(range(total), "generating", console=console, disable=not console.is_terminal)
    generated: dict[int, Tensor] = {}

    def frames_of() -> Iterator[Tensor]:
        for number, (frame, _) in zip(steps, stream, strict=False):  # the stream may have no end
            if number in after:
                generated[number] = frame[0].float().cpu()
            yield frame[0]

    write_video(target, frames_of(), fps)
    rows: dict[str, dict[int, Tensor | None]] = {
        "context": {number + 1: beginning[number] for number in chosen(context)},
        "truth": {at + 1: truth.get(number) for number, at in after.items()},  # it may end sooner
        "prediction": {at + 1: generated[number] for number, at in after.items()},
    }
    save_figure(sheet, contact_sheet(rows))
    console.print(f"video: {target}\nsheet: {sheet}")
    return 0


def read_actions(path: Path, count: int) -> Tensor:
    """Actions (1, count) from a file; whether they exist, the network says."""
    actions = read_array(path)
    whole = np.issubdtype(actions.dtype, np.integer) and np.can_cast(actions.dtype, np.int64)
    if actions.ndim != 1 or not whole or len(actions) < count:
        raise ValueError(
            f"{path} must hold an integer, int64 or narrower, for each of {count} frames, context included; "
            f"it has {actions.dtype} {actions.shape}"
        )
    return torch.from_numpy(actions[:count].astype(np.int64))[None].to(device())
