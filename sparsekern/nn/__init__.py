"""Layers: activations that keep few neurons alive, a decoder of codes, a counter of dead ones."""

from .batch_topk import BatchTopK
from .counter import DeadNeuronCounter
from .jumprelu import JumpReLU, jumprelu, step
from .linear import SparseLinear
from .spatial_sparsity import SpatialSparsity
from .topk import TopK

__all__ = [
    "BatchTopK",
    "DeadNeuronCounter",
    "JumpReLU",
    "SparseLinear",
    "SpatialSparsity",
    "TopK",
    "jumprelu",
    "step",
]
