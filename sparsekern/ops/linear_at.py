"""Scores of a linear layer at given latents of each row.

Gradients reach a layer through them when its latents were selected elsewhere.

Definition, with the indices held constant:

    scores[b, j] = ((x[b] - pre_bias) . weight[indices[b, j]] + bias[indices[b, j]])
                   * scale[indices[b, j]]

Written with the products of sparse_matmul, so that every backend shares it, no [B, N] and no
[B, k, D] is ever made, and gradients of any order exist.
"""

from __future__ import annotations

import torch

from .checks import autocasting, check_codes
from .codes import Transposition
from .gather_dot.operation import gather_dot
from .linear_topk.checks import check_layer
from .linear_topk.operation import autocast_layer
from .linear_topk.reference import centred
from .transpose_codes.checks import check_transposition


def linear_at(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    indices: torch.Tensor,
    *,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    transposition: Transposition | None = None,
) -> torch.Tensor:
    """Return the scores of a linear layer at some latents of each row.

    Equivalent PyTorch::

        scores = F.linear(x - pre_bias, weight, bias) * scale
        values = scores.gather(-1, indices)

    Args:
        x: [..., D] float32, bfloat16, float16 or float64.
        weight: [N, D] of x's dtype, or float32 with a 16-bit x.
        bias: [N] of weight's dtype, or None.
        indices: [..., k] int64 or int32 in 0..N-1; may repeat within a row.
        pre_bias: [D] of weight's dtype, subtracted from x; None subtracts nothing.
        scale: [N] of weight's dtype, factors of the scores; None scales nothing.
        transposition: of the indices, from `transpose_codes`, where it is known.

    Returns:
        [..., k] of x's dtype, differentiable with respect to x, weight, bias, pre_bias and scale.
        Sums run in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside 0..N-1 (on the CPU).

    Example:
        >>> import torch, sparsekern
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> indices = torch.tensor([[2, 1]])
        >>> sparsekern.linear_at(torch.tensor([[1.0, -2.0]]), weight, None, indices).tolist()
        [[-1.0, -2.0]]
    """
    op = "linear_at"
    check_layer(op, x, weight, bias, pre_bias, scale, None)
    check_codes(op, None, indices)
    if indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: indices must be {[*x.shape[:-1], 'k']} for x {list(x.shape)}, "
            f"got shape {list(indices.shape)}"
        )
    check_transposition(op, transposition, indices, weight.shape[0])
    if autocasting(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias, _, pre_bias, scale = autocast_layer(
            (x, weight, bias, None, pre_bias, scale), dtype
        )
        with torch.autocast(x.device.type, enabled=False):
            return _scores_at(x, weight, bias, indices, pre_bias, scale, transposition)
    return _scores_at(x, weight, bias, indices, pre_bias, scale, transposition)


def _scores_at(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    indices: torch.Tensor,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    transposition: Transposition | None,
) -> torch.Tensor:
    scores = gather_dot(centred(x, pre_bias), weight, indices, *(transposition or (None, None)))
    if bias is not None:
        scores = scores + vector_at(bias.to(x.dtype), indices, transposition)
    if scale is not None:
        scores = scores * vector_at(scale.to(x.dtype), indices, transposition)
    return scores


def vector_at(
    vector: torch.Tensor, indices: torch.Tensor, transposition: Transposition | None = None
) -> torch.Tensor:
    """Return vector[indices] of a vector [N], with a gradient that is summed latent by latent.

    Each latent's terms are added in the same order every time, and quickly where latents repeat.
    """
    ones = vector.new_ones(*indices.shape[:-1], 1)
    products: torch.Tensor = gather_dot(
        ones, vector.unsqueeze(1), indices, *(transposition or (None, None))
    )
    return products
