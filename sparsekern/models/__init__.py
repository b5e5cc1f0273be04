"""Models that use sparsekern's layers, one file each with its loss."""

from .bottleneck import BottleneckOutput, SparseBottleneck
from .sae import SAELoss, SAEOutput, SparseAutoencoder
from .vae_sae import VAESAE, VAESAELoss, VAESAEOutput, vae_sae_loss

__all__ = [
    "VAESAE",
    "BottleneckOutput",
    "SAELoss",
    "SAEOutput",
    "SparseAutoencoder",
    "SparseBottleneck",
    "VAESAELoss",
    "VAESAEOutput",
    "vae_sae_loss",
]
