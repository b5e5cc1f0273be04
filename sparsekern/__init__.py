"""sparsekern: fused kernels for networks with extremely sparse activations."""

import torch as _torch  # first: the native modules then share its OpenMP runtime

from ._library import BackendUnavailableError, backend, describe
from .nn import DeadNeuronCounter, TopK
from .ops import Codes, CountedCodes, count_active, sparse_matmul, topk, topk_mask

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "Codes",
    "CountedCodes",
    "DeadNeuronCounter",
    "TopK",
    "backend",
    "count_active",
    "describe",
    "sparse_matmul",
    "topk",
    "topk_mask",
]

del _torch
