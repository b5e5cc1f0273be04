"""Data sets with known factors, rendered here or read from files, motif domains, and stores of
activations."""

from . import dsprites, shapes3d
from .activation_capture import capture
from .activation_origins import Origins
from .activation_sources import convert, synthetic
from .activation_statistics import ActivationStatistics
from .activation_writing import write_activations
from .activations import ActivationStore
from .dsprites import DSprites, load, rendered
from .factors import CountError, DataError
from .image_writing import WritingInterrupted
from .motif_drawing import draw_motifs
from .motifs import TEST_SEED, VALIDATION_SEED, MotifBatch, MotifDomain, motif_domain
from .shapes3d import Shapes3D

__all__ = [
    "TEST_SEED",
    "VALIDATION_SEED",
    "ActivationStatistics",
    "ActivationStore",
    "CountError",
    "DSprites",
    "DataError",
    "MotifBatch",
    "MotifDomain",
    "Origins",
    "Shapes3D",
    "WritingInterrupted",
    "capture",
    "convert",
    "draw_motifs",
    "dsprites",
    "load",
    "motif_domain",
    "rendered",
    "shapes3d",
    "synthetic",
    "write_activations",
]
