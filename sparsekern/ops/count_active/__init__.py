"""Counts of how often each latent fired.

Definition: counts[i] = number of codes (b, j) with indices[b, j] = i, and, where values are given,
values[b, j] != 0. Integers, so the order of counting does not matter, and there is no gradient.
"""

from __future__ import annotations

import torch

from ..checks import check_codes, check_count
from . import operation

__all__ = ["count_active"]


def count_active(indices: torch.Tensor, n: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """Return how often each of n latents fired in a batch of codes.

    Equivalent PyTorch: ``torch.bincount(indices[values != 0], minlength=n)``, without its host
    synchronisation.

    Args:
        indices: [...] int64 or int32, in 0..n-1.
        n: number of latents, at least 1.
        values: [...] floating point, same shape; a code whose value is zero (after ReLU, say) does
            not count.

    Returns:
        counts [n] int64, not differentiable.

    Raises:
        TypeError: indices are not integers, values not floating point, n not an integer.
        ValueError: shapes or devices differ, or n < 1.
        IndexError: an index outside 0..n-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, and such codes are left out of the counts otherwise).

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.count_active(torch.tensor([[0, 2], [2, 1]]), 4).tolist()
        [1, 1, 2, 0]
    """
    check_codes("count_active", values, indices)
    n = check_count("count_active", "n", n, 2**31 - 1, "the number of latents")
    return operation.count_active(indices, n, values)
