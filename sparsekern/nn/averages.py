"""Running averages, which 16 bits are too coarse for."""

from __future__ import annotations

import torch
from torch import Tensor


def in_its_dtype(before: Tensor, after: Tensor) -> Tensor:
    """A buffer after half(), bfloat16(), to(...) or to_empty(): where it was moved to, with the
    dtype that it had before."""
    if after.dtype == before.dtype:
        return after
    if before.is_meta or after.is_meta:
        return torch.empty_like(before, device=after.device)
    return before.to(after.device)
