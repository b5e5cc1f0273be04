"""The definition of count_active in torch."""

from __future__ import annotations

import torch

from ..checks import check_range


def counts_reference(
    indices: torch.Tensor, n: int, values: torch.Tensor | None = None
) -> torch.Tensor:
    """Count as `count_active` does, for indices already known to lie in 0..n-1."""
    fired = torch.ones_like(indices) if values is None else (values != 0).to(indices.dtype)
    counts = indices.new_zeros(n, dtype=torch.int64)
    return counts.scatter_add(0, indices.reshape(-1).long(), fired.reshape(-1).long())


def count_active_reference(
    indices: torch.Tensor, n: int, values: torch.Tensor | None
) -> torch.Tensor:
    check_range("count_active", indices, n)
    return counts_reference(indices, n, values)
