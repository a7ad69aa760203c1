"""What the commands `eval` and `predict` do, by the task of a config."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseModel

from vision_ssm.engine.config import config_name, resolve
from vision_ssm.engine.segmentation.measures import measure_folder, measure_volumes
from vision_ssm.engine.segmentation.predict import label
from vision_ssm.engine.tasks import Segmentation
from vision_ssm.engine.training.evaluate import measure_by_metrics
from vision_ssm.engine.video.cine import label_cine
from vision_ssm.engine.video.cine_scores import measure_cine_folder, measure_cines
from vision_ssm.engine.video.classification import classify_file
from vision_ssm.engine.video.clips import CineSegmentation, ClipClassification
from vision_ssm.engine.video.codes import Tokenization, measure_reconstructions
from vision_ssm.engine.video.continuation import continue_file
from vision_ssm.engine.video.next_frame import FramePrediction
from vision_ssm.engine.video.rollouts import measure_rollouts

__all__ = ["COMPARISONS", "MEASURES", "PREDICTIONS", "call"]

Serving = Mapping[type[BaseModel], Callable[..., Any]]

MEASURES: Serving = {
    FramePrediction: measure_rollouts,
    Tokenization: measure_reconstructions,
    CineSegmentation: measure_cines,
    Segmentation: measure_volumes,
    BaseModel: measure_by_metrics,
}
"""Measures a checkpoint of a config."""

COMPARISONS: Serving = {Segmentation: measure_folder, CineSegmentation: measure_cine_folder}
"""Measures what is in a folder against the truth in another."""

PREDICTIONS: Serving = {
    FramePrediction: continue_file,
    ClipClassification: classify_file,
    CineSegmentation: label_cine,
    Segmentation: label,
}
"""Reads a file or folder, and writes what a checkpoint of a config makes of it."""


def call(serving: Serving, config: Config, *arguments: Any, options: Mapping[str, Any], **common: Any) -> Any:
    """What serves the task of a config, called with it, the arguments, and what was given on the command line.

    Args:
        options: keywords that only some tasks take.
        common: keywords that all take.

    Raises:
        ValueError: nothing serves this task, or what does takes no such option.
    """
    task: Any = resolve(config.model["type"])
    function = next((function for served, function in serving.items() if issubclass(task, served)), None)
    if function is None:
        served = ", ".join(kind.__name__ for kind in serving)
        raise ValueError(
            f"config {config_name(config)} has the task {task.__name__}, this command serves {served}; take another"
        )
    taken = inspect.signature(function).parameters
    if foreign := [name for name in options if name not in taken]:
        raise ValueError(
            f"--{foreign[0]} is nothing for config {config_name(config)}, whose task is {task.__name__}; leave it out"
        )
    return function(config, *arguments, **common, **options)
