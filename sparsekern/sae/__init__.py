"""The sparse autoencoder: model, encoding, decoding and the statistics that it begins with."""

from .model import SAELoss, SAEOutput, SparseAutoencoder

__all__ = ["SAELoss", "SAEOutput", "SparseAutoencoder"]
