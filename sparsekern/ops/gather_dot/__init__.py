"""Products of rows with chosen rows of a dictionary.

Definition, for a row x[b] and its indices:

    out[b, j] = x[b] . weight[indices[b, j]]

Gradients, with g = d loss / d out:

    d x[b]      = sum_j g[b, j] * weight[indices[b, j]]
    d weight[i] = sum over (b, j) with indices[b, j] = i of g[b, j] * x[b]

The first is a `sparse_matmul` of the codes (g, indices), the second its gradient of the weight; so
second derivatives exist, too. What is computed is the gradient of `sparse_matmul` with respect to
its values, and so are the kernels: all codes of a latent together, whose row is then read once.
"""

from __future__ import annotations

import torch

from ..codes import Transposition
from ..transpose_codes.checks import check_transposition
from . import operation
from .checks import check_arguments

__all__ = ["gather_dot"]


def gather_dot(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    *,
    transposition: Transposition | None = None,
) -> torch.Tensor:
    """Return the products of each row of x with chosen rows of weight.

    Equivalent PyTorch::

        out = (x.unsqueeze(-2) * weight[indices]).sum(-1)

    Args:
        x: [..., D] float32, bfloat16, float16 or float64.
        weight: [N, D] of x's dtype, or float32 with a 16-bit x. The transposed view of an
            ``nn.Linear(N, D).weight`` is read in place.
        indices: [..., k] int64 or int32 in 0..N-1; may repeat within a row.
        transposition: of these very indices, from `transpose_codes`; None makes it where it is
            needed.

    Returns:
        [..., k] of x's dtype, differentiable (twice and more) with respect to x and weight.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside 0..N-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, where its product is zero otherwise).

    Note:
        Sums run in float32 (float64 for float64). Memory: O(B k) integers, never [B, k, D] or
        [B, N]. Under autocast x is cast and the weight is read as it is.

    Example:
        >>> import torch, sparsekern
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> sparsekern.gather_dot(x, weight, torch.tensor([[1, 0, 1]])).tolist()
        [[2.0, 1.0, 2.0]]
    """
    check_arguments(x, weight, indices)
    check_transposition("gather_dot", transposition, indices, weight.shape[0])
    products: torch.Tensor = operation.gather_dot(
        x, weight, indices, *(transposition or (None, None))
    )
    return products
