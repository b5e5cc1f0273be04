"""The k*B largest of a whole batch of B rows: BatchTopK.

Definition, for a matrix x of B rows and n columns, flattened row by row, with elements ordered by
value (largest first, NaN before +inf, -0 equal to +0) and then by flat index (smallest first):

    batch_topk(x, k) = y with y_i = x_i for the first floor(k * B) elements of that order, else 0

Gradient: selection is locally constant, so dx = dy masked to what was kept; an element that ReLU
set to zero gets none. It is written with public operations, so that every backend shares it and a
second derivative exists.

Source: Bussmann, Leask and Nanda 2024, BatchTopK sparse autoencoders (arXiv 2412.06410), section 3.
"""

from __future__ import annotations

import math
import numbers

import torch

from ..checks import check_count, check_floating
from . import operation

__all__ = ["batch_mask", "batch_topk", "check_share", "kept_in_all"]


def batch_topk(x: torch.Tensor, k: int | float, *, relu: bool = False) -> torch.Tensor:
    """Return x with everything but the k*B largest of its B rows together set to zero.

    Equivalent PyTorch, but with one definite answer for equal values::

        values, positions = x.flatten().topk(int(k * B))
        masked = torch.zeros_like(x).flatten().scatter(0, positions, values).view_as(x)

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides. B is the product of the
            leading dimensions, 1 if there are none.
        k: how many to keep per row on average, an integer in 1..n or a float in 0..n with
            int(k * B) >= 1; may differ from call to call.
        relu: also zero the kept values that are <= 0.

    Returns:
        [..., n], contiguous, of x's dtype, differentiable with respect to x.

    Raises:
        TypeError: x is not floating point, or k is not a number.
        ValueError: x has no dimension, k is out of range, or int(k * B) is 0.

    Note:
        Equal values are ordered by flat index, smallest first, so the result is the same on every
        backend, device and thread count. NaN ranks above +inf; -0.0 equals +0.0. A row may keep
        anything between none and all of its elements. The backward pass keeps k*B indices, not a
        mask. Memory: the output, candidates of about 2 k*B elements, and a copy of the rows (at
        most half of them) that hold more than twice their share. On a GPU the host waits once for
        each round of candidates, mostly one; while a CUDA graph is captured all of x are
        candidates, which needs no waiting but several passes.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.batch_topk(torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.2, 0.1]]), 1).tolist()
        [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    return batch_mask(x, k, relu=relu)[0]


def batch_mask(
    x: torch.Tensor, k: int | float, *, relu: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `batch_topk` does, and its codes.

    Returns:
        masked [..., n], values [total] and positions int64 [total] with total = int(k * B).
        Positions are flat and ascend; masked and values are differentiable.
    """
    op = "batch_topk"
    check_floating(op, "x", x)
    n = x.shape[-1]
    k = check_share(op, "k", k, n, "the size of the last dimension")
    rows = math.prod(x.shape[:-1])
    total = kept_in_all(op, k, rows) if rows > 0 else 0
    return operation.batch_topk(x, total, relu)


def batch_mask_of(
    x: torch.Tensor, total: int, *, relu: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `batch_mask` does, of the `total` largest elements; there may be none."""
    if total == 0:
        nothing = x.new_zeros(0)
        masked = x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)
        return masked, nothing, nothing.to(torch.int64)
    return operation.batch_topk(x, total, relu)


def kept_in_all(op: str, k: int | float, rows: int) -> int:
    """Return k * rows, rounded down; check that it is at least 1."""
    total = int(k * rows)
    if total < 1:
        raise ValueError(f"{op}: k must keep at least one element of {rows} rows, got {k}")
    return total


def check_share(op: str, name: str, k: int | float, upper: int, what: str) -> int | float:
    """Return k, an int in 1..upper or a float above 0 and at most upper; raise for others.

    what: the upper bound in words, for the message.
    """
    if not isinstance(k, (float, torch.SymFloat)):
        real = isinstance(k, numbers.Real) and not isinstance(k, numbers.Integral)
        if not real:
            return check_count(op, name, k, upper, what)
        k = float(k)
    if not 0 < k <= upper:
        raise ValueError(f"{op}: {name} must be above 0 and at most {upper} ({what}), got {k}")
    return k
