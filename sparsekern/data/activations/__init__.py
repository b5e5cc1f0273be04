"""Activations of a model: captured, converted, stored in files and read in shuffled batches."""

from .capture import capture
from .origins import Origins
from .sources import convert, synthetic
from .statistics import ActivationStatistics
from .store import ActivationStore
from .writing import write_activations

__all__ = [
    "ActivationStatistics",
    "ActivationStore",
    "Origins",
    "capture",
    "convert",
    "synthetic",
    "write_activations",
]
