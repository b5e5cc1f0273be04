"""Read, render and write data sets: images with known factors, motif domains, activations."""

from .activations import (
    ActivationStatistics,
    ActivationStore,
    Origins,
    capture,
    convert,
    synthetic,
    write_activations,
)
from .errors import CountError, DataError
from .images import dsprites, shapes3d
from .images.dsprites import DSprites, load, rendered
from .images.shapes3d import Shapes3D
from .images.writing import WritingInterrupted
from .motifs import (
    TEST_SEED,
    VALIDATION_SEED,
    MotifBatch,
    MotifDomain,
    draw_motifs,
    motif_domain,
)

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
