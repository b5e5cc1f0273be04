"""The k largest of each row, as codes or as a masked dense tensor.

Definition, for a row x of n values, ordered by value (largest first, NaN before +inf, -0 equal to
+0) and then by index (smallest first):

    topk(x, k)      = the first k pairs (x_i, i) of that order
    topk_mask(x, k) = y with y_i = x_i for the indices of topk(x, k), else 0

Gradient: selection is locally constant, so dx = scatter(dvalues, indices) and dx = dy masked to the
indices; a selected value that ReLU set to zero gets none. Both are written with public operations,
so that every backend shares them and a second derivative exists.
"""

from __future__ import annotations

import torch

from ..checks import check_count, check_floating
from ..codes import Codes
from . import operation

__all__ = ["Codes", "mask_with_codes", "topk", "topk_counts", "topk_mask"]


def topk(
    x: torch.Tensor,
    k: int,
    *,
    sorted: bool = True,
    relu: bool = False,
    abs: bool = False,
) -> Codes:
    """Return the k largest values of the last dimension and their indices.

    Equivalent PyTorch, but with one definite answer for equal values::

        order = x.sort(dim=-1, descending=True, stable=True)
        values, indices = order.values[..., :k], order.indices[..., :k]

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides, any number of leading
            dimensions.
        k: how many to keep, 1..n; may differ from call to call.
        sorted: True gives the largest first; False gives ascending indices, which is cheaper.
        relu: set selected values <= 0 to zero after the selection; their slots and indices stay.
        abs: select by magnitude; the values returned keep their sign.

    Returns:
        Codes(values, indices): values [..., k] of x's dtype, differentiable with respect to x;
        indices [..., k] int64.

    Raises:
        TypeError: x is not floating point, or k is not an integer.
        ValueError: x has no dimension, or k is outside 1..n.

    Note:
        Equal values are ordered by index, smallest first, so the result is the same on every
        backend, device and thread count. NaN ranks above +inf; -0.0 equals +0.0. Memory: the
        outputs, plus at most 64 KiB a thread on the CPU.

    Example:
        >>> import torch, sparsekern
        >>> values, indices = sparsekern.topk(torch.tensor([[0.1, 0.7, 0.7, -1.0]]), 2)
        >>> indices.tolist()
        [[1, 2]]
    """
    check_floating("topk", "x", x)
    k = check_count("topk", "k", k, x.shape[-1], "the size of the last dimension")
    values, indices, _ = operation.topk(x, k, sorted, relu, abs, False)
    return Codes(values, indices)


def topk_counts(
    x: torch.Tensor, k: int, *, sorted: bool = True, relu: bool = False, abs: bool = False
) -> tuple[Codes, torch.Tensor]:
    """Return the codes of `topk` and, from the same kernel, how often each latent fired.

    Equivalent PyTorch::

        codes = sparsekern.topk(x, k)
        counts = torch.bincount(codes.indices[codes.values != 0], minlength=x.shape[-1])

    Arguments, errors and the order of the codes are those of `topk`.

    Returns:
        Codes(values, indices), and counts int64 [n]: in how many rows each latent was selected with
        a value other than zero.

    Example:
        >>> import torch, sparsekern
        >>> codes, counts = sparsekern.topk_counts(torch.tensor([[3.0, 0.0], [2.0, 5.0]]), 1)
        >>> codes.indices.tolist(), counts.tolist()
        ([[0], [1]], [1, 1])
    """
    check_floating("topk_counts", "x", x)
    k = check_count("topk_counts", "k", k, x.shape[-1], "the size of the last dimension")
    values, indices, counts = operation.topk(x, k, sorted, relu, abs, True)
    return Codes(values, indices), counts


def topk_mask(x: torch.Tensor, k: int, *, relu: bool = False, abs: bool = False) -> torch.Tensor:
    """Return x with everything but the k largest of each row set to zero.

    Equivalent PyTorch::

        values, indices = sparsekern.topk(x, k)
        masked = torch.zeros_like(x).scatter(-1, indices, values)

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides.
        k: how many to keep, 1..n.
        relu: also zero the kept values that are <= 0.
        abs: keep the largest magnitudes instead; values keep their sign.

    Returns:
        [..., n], contiguous, of x's dtype, differentiable with respect to x.

    Raises:
        TypeError: x is not floating point, or k is not an integer.
        ValueError: x has no dimension, or k is outside 1..n.

    Note:
        One kernel selects and writes the masked row. Ties, NaN and signed zeros as in `topk`. The
        backward pass keeps only the k indices of a row, not a mask.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.topk_mask(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [3.0, 0.0, 2.0]
    """
    return mask_with_codes(x, k, relu=relu, abs=abs)[0]


def mask_with_codes(
    x: torch.Tensor, k: int, *, relu: bool = False, abs: bool = False, return_counts: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `topk_mask` does, and the codes and counts that its kernel makes on the way.

    Returns:
        masked [..., n]; values and indices [..., k], in ascending order of the indices; counts
        int64 [n], or [0] unless return_counts.
    """
    check_floating("topk_mask", "x", x)
    k = check_count("topk_mask", "k", k, x.shape[-1], "the size of the last dimension")
    return operation.topk_mask(x, k, relu, abs, return_counts)
