"""Sparse autoencoders on stored activations: presets, training, evaluation and run folders."""

from ...optim import Adam
from .config import PRESETS, SAEConfig
from .run import (
    FILES,
    TrainedRun,
    comparison,
    evaluate_run,
    load_run,
    measurements,
    run,
    saved_config,
    table,
)
from .task import SAETask, evaluate, make_model, recovered

Config = SAEConfig

__all__ = [
    "FILES",
    "PRESETS",
    "Adam",
    "Config",
    "SAEConfig",
    "SAETask",
    "TrainedRun",
    "comparison",
    "evaluate",
    "evaluate_run",
    "load_run",
    "make_model",
    "measurements",
    "recovered",
    "run",
    "saved_config",
    "table",
]
