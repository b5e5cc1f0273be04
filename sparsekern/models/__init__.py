"""Models that use sparsekern's layers, one file each with its loss."""

from ..sae.model import SAELoss, SAEOutput, SparseAutoencoder
from .bottleneck import BottleneckOutput, SparseBottleneck
from .sparling import (
    MotifModel,
    MotifOutput,
    PatchMotifs,
    PenalizedBottleneck,
    ResidualMotifs,
    SequenceReadout,
    SlotReadout,
    Widening,
    motif_loss,
)
from .vae_sae import VAESAE, VAESAELoss, VAESAEOutput, vae_sae_loss

__all__ = [
    "VAESAE",
    "BottleneckOutput",
    "MotifModel",
    "MotifOutput",
    "PatchMotifs",
    "PenalizedBottleneck",
    "ResidualMotifs",
    "SAELoss",
    "SAEOutput",
    "SequenceReadout",
    "SlotReadout",
    "SparseAutoencoder",
    "SparseBottleneck",
    "VAESAELoss",
    "VAESAEOutput",
    "Widening",
    "motif_loss",
    "vae_sae_loss",
]
