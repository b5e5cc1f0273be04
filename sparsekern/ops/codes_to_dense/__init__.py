"""Codes written into a dense tensor of zeros.

Definition, for a row of k codes with unique indices:

    dense[indices[j]] = values[j] for all j, else 0

Gradient: dvalues = ddense.gather(-1, indices).
"""

from __future__ import annotations

import torch

from ..checks import check_codes, check_count
from . import operation

__all__ = ["codes_to_dense"]


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Write codes whose indices are unique within a row into a dense tensor.

    Equivalent PyTorch: ``values.new_zeros(*values.shape[:-1], n).scatter(-1, indices, values)``

    Args:
        values: [..., k] floating point.
        indices: [..., k] int64 or int32, unique within a row, in 0..n-1 (as from `topk`).
        n: width of the result.

    Returns:
        [..., n] of values' dtype, differentiable with respect to values.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
        IndexError: an index outside 0..n-1 (not on a GPU, unless SPARSEKERN_DEBUG=1).
    """
    check_codes("codes_to_dense", values, indices)
    n = check_count("codes_to_dense", "n", n, 2**31 - 1, "the largest index")
    return operation.codes_to_dense(values, indices, n)
