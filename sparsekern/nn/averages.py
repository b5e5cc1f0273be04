"""Running averages, which keep their dtype in a layer that is converted to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_dtype(before: Tensor, after: Tensor) -> Tensor:
    """Return a buffer with the dtype it had before half(), bfloat16(), to(...) or to_empty().

    It is where the conversion moved it to.
    """
    if after.dtype == before.dtype:
        return after
    if before.is_meta or after.is_meta:
        return torch.empty_like(before, device=after.device)
    return before.to(after.device)
