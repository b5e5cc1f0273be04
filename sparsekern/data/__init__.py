"""Data sets with known factors, rendered here or read from files, and stores of activations."""

from . import dsprites, shapes3d
from .activation_sources import capture, convert, synthetic
from .activation_writing import write_activations
from .activations import ActivationStore
from .dsprites import DSprites, load, rendered
from .factors import CountError, DataError
from .image_writing import WritingInterrupted
from .shapes3d import Shapes3D

__all__ = [
    "ActivationStore",
    "CountError",
    "DSprites",
    "DataError",
    "Shapes3D",
    "WritingInterrupted",
    "capture",
    "convert",
    "dsprites",
    "load",
    "rendered",
    "shapes3d",
    "synthetic",
    "write_activations",
]
