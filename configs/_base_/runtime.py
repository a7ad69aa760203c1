"""What every run shares: loops by step, hooks, logs, seed."""

from mmengine.hooks import CheckpointHook, IterTimerHook, LoggerHook, ParamSchedulerHook, RuntimeInfoHook
from mmengine.runner import IterBasedTrainLoop, LogProcessor, TestLoop, ValLoop

from vision_ssm.engine.training.parallel import replicated
from vision_ssm.engine.training.watch import WatchHook

train_cfg = dict(type=IterBasedTrainLoop, max_iters=240, val_interval=80)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)

default_hooks = dict(
    runtime_info=dict(type=RuntimeInfoHook),
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    watch=dict(type=WatchHook, action="stop"),  # at a step that is not finite; or "skip"
    checkpoint=dict(type=CheckpointHook, interval=80, by_epoch=False, max_keep_ckpts=2),
)
model_wrapper_cfg = dict(type=replicated)  # under torchrun; or vision_ssm.engine.training.parallel.sharded
log_processor = dict(type=LogProcessor, by_epoch=False)
log_level = "ERROR"
randomness = dict(seed=0, diff_rank_seed=True)  # each process draws its own variants
