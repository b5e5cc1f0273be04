"""Models that use sparsekern's layers, one file each with its loss."""

from .vae_sae import VAESAE, VAESAELoss, VAESAEOutput, vae_sae_loss

__all__ = ["VAESAE", "VAESAELoss", "VAESAEOutput", "vae_sae_loss"]
