"""Integers in the order of floating point values.

Comparisons of integers do not depend on a thread's mode of flushing denormal numbers to zero.
"""

from __future__ import annotations

import torch


def key_of(values: torch.Tensor) -> torch.Tensor:
    """Return integers in the order of the values: NaN on top, -0 equal to +0.

    They have values' shape: int64 for float64, int32 for others.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    dtype = torch.int64 if values.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(dtype)
    bits = wide.view(dtype)
    bits = torch.where(bits == limits.min, 0, bits)  # -0 as +0
    key = bits ^ ((bits >> (limits.bits - 1)) & limits.max)
    return torch.where(wide.isnan(), limits.max, key)
