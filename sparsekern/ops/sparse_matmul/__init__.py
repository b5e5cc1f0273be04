"""Sparse codes times a dense dictionary, and its gradients.

Definition, with S the codes written as a dense [B, N] matrix (duplicate indices add up):

    out = S @ weight + bias            out[b] = bias + sum_j values[b, j] * weight[indices[b, j]]

Gradients, with g = d loss / d out:

    d values[b, j] = g[b] . weight[indices[b, j]]
    d weight[i]    = sum over codes (b, j) with index i of values[b, j] * g[b]
    d bias         = sum_b g[b]

Both are bilinear in (values, weight, g), so their own gradients are the same two operations again.

All of them need the codes grouped by latent: their transposition. It is built when it is needed, or
once by `transpose_codes` for every gradient of a training step that shares these indices.
"""

from __future__ import annotations

import torch

from ..checks import check_codes
from ..codes import Transposition
from ..transpose_codes.checks import check_transposition
from . import operation
from .checks import check_dictionary

__all__ = ["sparse_matmul"]


def sparse_matmul(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposition: Transposition | None = None,
) -> torch.Tensor:
    """Return codes @ weight + bias, reading only the active rows of weight.

    Equivalent PyTorch::

        out = (values.unsqueeze(-1) * weight[indices]).sum(-2) + bias

    Args:
        values: [..., K] float32, bfloat16, float16 or float64.
        indices: [..., K] int64 or int32, in 0..N-1; duplicates in a row add up.
        weight: [N, D], of values' dtype, or float32 with bfloat16 or float16 values. The transposed
            view of an ``nn.Linear(N, D).weight`` is read in place, and its gradient comes back in
            the same layout.
        bias: [D] of weight's dtype, or None.
        transposition: of these very indices, from `transpose_codes`; spares the backward pass its
            own. None builds it there.

    Returns:
        [..., D] of values' dtype, differentiable (twice and more) with respect to values, weight
        and bias.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside 0..N-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, where such codes contribute nothing otherwise).

    Note:
        Sums run in float32 (float64 for float64). The weight gradient and the value gradient come
        from one latent-major pass over a counting-sort transposition of the codes, without float
        atomics: the same bits for every thread count and run. Memory: O(B K) integers, never
        [B, K, D] or [B, N]. Under autocast the values are cast and the weight is read as it is.

    Example:
        >>> import torch, sparsekern
        >>> values, indices = torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 2]])
        >>> sparsekern.sparse_matmul(values, indices, torch.eye(3)).tolist()
        [[2.0, 0.0, 1.0]]
    """
    if transposition is None:
        quick = operation.quick_product(values, indices, weight, bias)
        if quick is not None:
            return quick
    check_codes("sparse_matmul", values, indices)
    check_dictionary(values, weight, bias)
    check_transposition("sparse_matmul", transposition, indices, weight.shape[0])
    return operation.sparse_matmul(values, indices, weight, bias, *(transposition or (None, None)))
