"""The order of values, as integers: comparisons of integers do not depend on whether a thread
flushes denormal numbers to zero."""

from __future__ import annotations

import torch


def key_of(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values: NaN on top, -0 equal to +0. Of values' shape, int64 for
    float64 and int32 for others."""
    wide = values if values.dtype == torch.float64 else values.float()
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = wide.view(integer)
    bits = torch.where(bits == limits.min, 0, bits)  # -0 as +0
    key = bits ^ ((bits >> (limits.bits - 1)) & limits.max)
    return torch.where(wide.isnan(), limits.max, key)
