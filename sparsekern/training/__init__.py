"""Training that knows no model by name: the loop, schedules, checkpoints and run folders."""

from sparsekern.training.checkpoints import CheckpointError
from sparsekern.training.loop import LoopConfig, Outcome, Task, TrainingError, train
from sparsekern.training.runs import RunError, RunFolder
from sparsekern.training.schedules import SCHEDULES, scheduled_k

__all__ = [
    "SCHEDULES",
    "CheckpointError",
    "LoopConfig",
    "Outcome",
    "RunError",
    "RunFolder",
    "Task",
    "TrainingError",
    "scheduled_k",
    "train",
]
