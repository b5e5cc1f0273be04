"""What each operation means: checks, reference and gradient, one file per stem."""

from .activity import count_active
from .adam import adam_step
from .batch_norm import batch_norm
from .batch_topk import batch_topk
from .jumprelu import jumprelu, step
from .linear_at import linear_at
from .linear_topk import TransposedCodes, linear_topk
from .pointwise_conv import pointwise_conv
from .sparse_matmul import sparse_matmul
from .threshold import channel_threshold
from .threshold_relu import ChannelCodes, threshold_codes, threshold_relu
from .topk import Codes, CountedCodes, codes_to_dense, topk, topk_mask
from .transposition import Transposition, transpose_codes

__all__ = [
    "ChannelCodes",
    "Codes",
    "CountedCodes",
    "TransposedCodes",
    "Transposition",
    "adam_step",
    "batch_norm",
    "batch_topk",
    "channel_threshold",
    "codes_to_dense",
    "count_active",
    "jumprelu",
    "linear_at",
    "linear_topk",
    "pointwise_conv",
    "sparse_matmul",
    "step",
    "threshold_codes",
    "threshold_relu",
    "topk",
    "topk_mask",
    "transpose_codes",
]
