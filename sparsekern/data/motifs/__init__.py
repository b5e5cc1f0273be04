"""Motif domains: inputs made of known motifs, whose places and labels are known, too."""

from .domain import TEST_SEED, VALIDATION_SEED, MotifBatch, MotifDomain
from .domains import motif_domain
from .drawing import draw_motifs

__all__ = [
    "TEST_SEED",
    "VALIDATION_SEED",
    "MotifBatch",
    "MotifDomain",
    "draw_motifs",
    "motif_domain",
]
