"""The operations, a folder each.

__init__   definition and public function
reference  the definition in torch
checks     checks of the arguments
operation  the torch operation: shapes, gradients, batches, and the choice of kernels
native     calls of the compiled kernels
triton     Triton kernels
"""

from .adam_step import adam_step
from .batch_norm import batch_norm
from .batch_topk import batch_topk
from .channel_threshold import channel_threshold
from .codes import Codes, Transposition
from .codes_to_dense import codes_to_dense
from .count_active import count_active
from .gather_dot import gather_dot
from .jumprelu import jumprelu, step
from .linear_at import linear_at
from .linear_topk import (
    RoundedWeight,
    keep_rounded,
    linear_topk,
    linear_topk_transposed,
    screening,
)
from .pointwise_conv import pointwise_conv
from .sparse_matmul import sparse_matmul
from .threshold_relu import ChannelCodes, threshold_codes, threshold_relu
from .topk import topk, topk_counts, topk_mask
from .transpose_codes import transpose_codes

__all__ = [
    "ChannelCodes",
    "Codes",
    "RoundedWeight",
    "Transposition",
    "adam_step",
    "batch_norm",
    "batch_topk",
    "channel_threshold",
    "codes_to_dense",
    "count_active",
    "gather_dot",
    "jumprelu",
    "keep_rounded",
    "linear_at",
    "linear_topk",
    "linear_topk_transposed",
    "pointwise_conv",
    "screening",
    "sparse_matmul",
    "step",
    "threshold_codes",
    "threshold_relu",
    "topk",
    "topk_counts",
    "topk_mask",
    "transpose_codes",
]
