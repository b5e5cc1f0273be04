"""What each operation means: checks, reference and gradient, one file per stem."""

from .activity import count_active
from .sparse_matmul import sparse_matmul
from .topk import Codes, CountedCodes, codes_to_dense, topk, topk_mask

__all__ = [
    "Codes",
    "CountedCodes",
    "codes_to_dense",
    "count_active",
    "sparse_matmul",
    "topk",
    "topk_mask",
]
