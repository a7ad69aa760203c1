"""BraTS-like cases with SegMamba, weights, gradients and moments shared out among the processes (FSDP).

In one process it is ``brats_segmamba``.
"""

from mmengine.config import read_base

from vision_ssm.engine.training.parallel import sharded

with read_base():
    from .brats_segmamba import *

model_wrapper_cfg.update(type=sharded, unit=1_000_000)
