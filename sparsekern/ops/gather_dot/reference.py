"""The definition of gather_dot in torch."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_range
from ..layout import sum_dtype


def gather_dot_reference(
    x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, *_transposition: Any
) -> torch.Tensor:
    """Return x . weight[indices], gathered."""
    check_range("gather_dot", indices, weight.shape[0])
    wide = sum_dtype(x.dtype)
    products = torch.einsum("...d,...kd->...k", x.to(wide), weight[indices.long()].to(wide))
    return products.to(x.dtype).contiguous()
