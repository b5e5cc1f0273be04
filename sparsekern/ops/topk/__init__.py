"""The k largest or smallest of each row, as codes; the k largest as a masked dense tensor.

Definition, for a row x of n values, ordered by value (largest first, NaN before +inf, -0 equal to
+0) and then by index (smallest first):

    topk(x, k)      = the first k pairs (x_i, i) of that order
    topk_mask(x, k) = y with y_i = x_i for the indices of topk(x, k), else 0

topk(x, k, largest=False) orders by value the other way round (smallest first, NaN last) and then
by index (smallest first, too).

Gradient: selection is locally constant, so dx = scatter(dvalues, indices) and dx = dy masked to the
indices; a selected value that ReLU set to zero gets none. Both are written with public operations,
so that every backend shares them and a second derivative exists.
"""

from __future__ import annotations

import torch

from ..checks import FLOATING, INTEGERS, check_count, check_dense, check_dim, check_floating
from ..codes import Codes
from . import operation
from .integers import integer_topk

__all__ = ["Codes", "mask_with_codes", "topk", "topk_counts", "topk_mask"]


def topk(
    x: torch.Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    relu: bool = False,
    abs: bool = False,
    out: None = None,
) -> Codes:
    """Return the k largest values of a dimension, or the smallest, and their indices.

    The signature is that of torch.topk. Equivalent PyTorch, but with one definite answer for equal
    values::

        order = x.sort(dim=dim, descending=largest, stable=True)
        values, indices = order.values.narrow(dim, 0, k), order.indices.narrow(dim, 0, k)

    Args:
        x: [..., n] float32, bfloat16, float16 or float64, or integers (no bool, nothing unsigned
            but uint8); any strides, any number of dimensions.
        k: how many to keep, 0..n; may differ from call to call. A 0-d tensor of integers is read
            first, for which the host waits for its device.
        dim: the dimension of n elements. Another than the last costs a copy of x.
        largest: False gives the smallest.
        sorted: True gives the largest (or smallest) first; False gives ascending indices, which is
            cheaper.
        relu: set selected values <= 0 to zero after the selection; their slots and indices stay.
        abs: select by magnitude; the values returned keep their sign.
        out: None; torch's is not supported.

    Returns:
        Codes(values, indices): values of x's dtype, differentiable with respect to x; indices
        int64. Both have x's shape with k in the place of n, and are contiguous. A tensor without
        dimensions gives its only element, for k = 0, too, as in torch.

    Raises:
        TypeError: x has another dtype or is not dense, k or dim is not an integer, or there is an
            out.
        ValueError: k is outside 0..n.
        IndexError: x has no such dimension.

    Note:
        Equal values are ordered by index, smallest first, so the result is the same on every
        backend, device and thread count. NaN ranks above +inf, so it is last among the smallest;
        -0.0 equals +0.0. Memory: the outputs, plus at most 64 KiB a thread on the CPU; for the
        smallest there a few rows a thread, and in CUDA a copy of x. Integers are selected through
        float32 or float64, which hold them exactly, and int64 by a stable sort, which is no faster
        than torch's.

    Example:
        >>> import torch, sparsekern
        >>> values, indices = sparsekern.topk(torch.tensor([[0.1, 0.7, 0.7, -1.0]]), 2)
        >>> indices.tolist()
        [[1, 2]]
        >>> sparsekern.topk(torch.tensor([[3, 1], [0, 2]]), 1, dim=0, largest=False).values
        tensor([[0, 1]])
    """
    if type(dim) is int and dim == -1 and out is None:
        quick = operation.quick_topk(x, k, sorted, relu, abs, not largest)
        if quick is not None:
            return Codes(*quick)
    if out is not None:
        raise TypeError(
            f"topk: out must be None, since the results are new tensors, got {type(out).__name__}"
        )
    check_dense("topk", "x", x)
    if x.dtype not in FLOATING and x.dtype not in INTEGERS:
        raise TypeError(
            "topk: x must be float32, bfloat16, float16, float64, uint8 or signed integers, "
            f"got {x.dtype}"
        )
    dimensions = x.dim()
    dim = check_dim("topk", dim, dimensions)
    if dimensions == 0:
        check_count("topk", "k", k, 1, "the elements of a 0-d tensor", lower=0)
        values, indices = topk(x.reshape(1), 1, relu=relu, abs=abs)
        return Codes(values.reshape(()), indices.reshape(()))
    last = dim == dimensions - 1
    which = "the last dimension" if last else f"dimension {dim}"
    k = check_count("topk", "k", k, x.shape[dim], f"the size of {which}", lower=0)
    # a kernel reads what lies side by side several times as fast
    rows = x if last else x.movedim(dim, -1).contiguous()
    if x.dtype in FLOATING:
        arguments = (rows, k, sorted, relu, abs)
        quick = operation.quick_topk(*arguments, not largest)
        values, indices = quick or operation.topk(*arguments, False, not largest)[:2]
    else:
        values, indices = integer_topk(rows, k, largest, sorted, relu, abs)
    if not last:
        values, indices = (t.movedim(-1, dim).contiguous() for t in (values, indices))
    return Codes(values, indices)


def topk_counts(
    x: torch.Tensor, k: int, *, sorted: bool = True, relu: bool = False, abs: bool = False
) -> tuple[Codes, torch.Tensor]:
    """Return the codes of `topk` and, from the same kernel, how often each latent fired.

    Equivalent PyTorch::

        codes = sparsekern.topk(x, k)
        counts = torch.bincount(codes.indices[codes.values != 0], minlength=x.shape[-1])

    x: [..., n] float32, bfloat16, float16 or float64; k: 1..n. The other arguments, the errors and
    the order of the codes are those of `topk`.

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
