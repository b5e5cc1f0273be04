"""The k largest outputs of a linear layer: the encoder of a sparse autoencoder.

Definition:

    scores = ((x - pre_bias) @ weight.T + bias) * scale         [B, N], never stored
    values, indices = topk(scores, k), then ReLU on the values

Gradient, with m = 1 where ReLU let a value pass and g = m * d values * scale[indices]:

    d weight[i]  = sum over codes (b, j) with index i of g[b, j] * (x[b] - pre_bias)
    d bias[i]    = sum over codes (b, j) with index i of g[b, j]
    d x[b]       = sum_j g[b, j] * weight[indices[b, j]]
    d pre_bias   = -sum_b d x[b]
    d scale[i]   = sum over codes (b, j) with index i of g[b, j] * scores[b, i] / scale[i]^2

These are the products of sparse_matmul, so every backend shares them and a second derivative
exists.

The file slices.py says how the scores are never stored.
"""

from __future__ import annotations

import torch

from ..checks import check_count
from ..codes import Codes, Transposition
from . import operation
from .checks import check_groups, check_layer
from .kept import RoundedWeight, keep_rounded
from .screen import screening

__all__ = [
    "RoundedWeight",
    "keep_rounded",
    "linear_topk",
    "linear_topk_transposed",
    "screening",
]


def linear_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    *,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    groups: int = 1,
    relu: bool = True,
    sorted: bool = False,
) -> Codes:
    """Return the codes of the k largest scores of a linear layer, never storing all scores.

    Equivalent PyTorch::

        scores = F.linear(x - pre_bias, weight, bias) * scale
        values, indices = scores.topk(k)
        values = values.relu()

    Args:
        x: [..., D] float32, bfloat16, float16 or float64.
        weight: [N, D] of x's dtype, or float32 with a 16-bit x (it is then rounded slice by slice,
            and its gradient is float32).
        bias: [N] of weight's dtype, or None.
        k: how many to keep, 1..N (or 1..len(latents)).
        pre_bias: [D] of weight's dtype, subtracted from x; None subtracts nothing.
        scale: [N] of weight's dtype, positive: factors of the scores, such as the norms of the
            decoder's rows. The values returned are scaled, too.
        latents: [M] int64, ascending: only these are computed and selected from (dead latents, for
            an auxiliary loss). Indices still count all N.
        groups: select in so many groups of consecutive latents separately, k / groups from each;
            divides k and N, and excludes `latents`. The codes come group by group.
        relu: set selected values <= 0 to zero; their slots and indices stay, without gradient.
        sorted: True gives the largest first (of a group); False gives ascending indices, which is
            cheaper and the order in which `sparse_matmul` reads the dictionary best.

    Returns:
        Codes(values, indices): values [..., k] of x's dtype, differentiable (twice and more) with
        respect to x, weight, bias, pre_bias and scale; indices [..., k] int64.

    Raises:
        TypeError: a dtype that does not fit, or k is not an integer.
        ValueError: shapes or devices that do not fit, or k is out of range.
        IndexError: an element of latents outside 0..N-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, and an assertion of torch's otherwise).

    Note:
        Scores are ranked in x's dtype, as in the dense expression. The products may differ from its
        own in the last bits, so scores that differ by no more may change places. Equal scores are
        ordered by index. Memory: buffers of at most 7 Mi scores (and as many weights, where they
        have to be converted or gathered), and k codes per slice of latents; never [B, N], and
        never [B, k, D] in the backward pass.

        On a CPU that multiplies bfloat16 numbers, float32 rows are screened by a product in
        bfloat16 where that pays: latents that a bound of its error excludes are left out, and the
        scores of the others are computed in float32, as `linear_at` computes them. The codes are
        those of all latents' float32 scores in that order of additions, whatever the number of
        threads (see the page "How the encoder is exact"). `screening` turns it off, `keep_rounded`
        makes it pay for a few rows. Up to 32 float32 rows and a row-major weight on a CPU have all
        their scores computed in that order, by a kernel of their own, if they are not screened.

    Example:
        >>> import torch, sparsekern
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> values, indices = sparsekern.linear_topk(x, weight, None, 2)
        >>> values.tolist(), indices.tolist()
        ([[1.0, 0.0]], [[0, 2]])
    """
    if (
        latents is None
        and pre_bias is None
        and scale is None
        and type(groups) is int
        and groups == 1
    ):
        quick = operation.quick_linear_topk(x, weight, bias, k, relu, sorted)
        if quick is not None:
            return Codes(*quick)
    values, indices, _, _ = operation.linear_topk(
        *_check("linear_topk", x, weight, bias, k, pre_bias, scale, latents, groups),
        relu, sorted, False,
    )  # fmt: skip
    return Codes(values, indices)


def linear_topk_transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    *,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    groups: int = 1,
    relu: bool = True,
    sorted: bool = False,
) -> tuple[Codes, Transposition]:
    """Return the codes of `linear_topk` and the transposition of their indices.

    Equivalent PyTorch::

        codes = sparsekern.linear_topk(x, weight, bias, k)
        transposition = sparsekern.transpose_codes(codes.indices, len(weight))

    The backward pass of `linear_topk` needs the transposition anyway: made here, it serves a
    `sparse_matmul` with the same indices, too. Arguments, errors and codes are those of
    `linear_topk`.

    Returns:
        Codes(values, indices), and the Transposition(offsets, positions) of the indices.

    Example:
        >>> import torch, sparsekern
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> codes, transposition = sparsekern.linear_topk_transposed(x, weight, None, 1)
        >>> codes.indices.tolist(), transposition.offsets.tolist()
        ([[1]], [0, 0, 1])
    """
    values, indices, *transposition = operation.linear_topk(
        *_check("linear_topk_transposed", x, weight, bias, k, pre_bias, scale, latents, groups),
        relu, sorted, True,
    )  # fmt: skip
    return Codes(values, indices), Transposition(*transposition)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
    groups: int,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    int,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
]:
    """Check the arguments of the operation and return them, k and groups as plain integers."""
    check_layer(op, x, weight, bias, pre_bias, scale, latents)
    width = weight.shape[0] if latents is None else latents.shape[0]
    what = "the number of latents" if latents is None else "the size of latents"
    k = check_count(op, "k", k, width, what)
    groups = check_groups(op, groups, k, width, latents)
    return x, weight, bias, k, pre_bias, scale, latents, groups
