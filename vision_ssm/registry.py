"""The registry that mmengine looks for by the prefix of ``type="vision_ssm.VSSMBackbone"``."""

from .engine.openmmlab import MODELS

__all__ = ["MODELS"]
