"""Motif domains: inputs made of known motifs, whose places and labels are known, too."""

from .domain import TEST_SEED, VALIDATION_SEED, MotifBatch, MotifDomain
from .drawing import draw_motifs
from .registry import motif_domain

__all__ = [
    "TEST_SEED",
    "VALIDATION_SEED",
    "MotifBatch",
    "MotifDomain",
    "draw_motifs",
    "motif_domain",
]
