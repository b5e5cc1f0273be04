"""Training that knows no model by name: the loop, schedules, checkpoints and run folders."""

from .._system import stop_signals
from .annealing import AccuracyGatedDensity
from .batches import permuted_rows
from .checkpoints import CheckpointError
from .finite import TrainingError
from .loop import LoopConfig, Outcome, Task, train
from .runs import RunError, RunFolder
from .schedules import SCHEDULES, scheduled_k

__all__ = [
    "SCHEDULES",
    "AccuracyGatedDensity",
    "CheckpointError",
    "LoopConfig",
    "Outcome",
    "RunError",
    "RunFolder",
    "Task",
    "TrainingError",
    "permuted_rows",
    "scheduled_k",
    "stop_signals",
    "train",
]
