"""The k largest outputs of a linear layer, without the outputs: the encoder of a sparse
autoencoder.

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

How the scores are never stored: see linear_slices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch

from ..dispatch import library
from .batching import one_by_one
from .checks import check_count
from .exported import exported
from .linear_checks import check_groups, check_latents, check_layer
from .linear_slices import Layer, Selection, rows_at_once, select_rows
from .sparse_matmul import _sparse_matmul, _sparse_matmul_backward, matrix_of
from .topk import Codes, passed_by_relu, topk_reference
from .transposition import Transposition, _transpose_codes


@exported("sparsekern.ops.linear_topk.TransposedCodes")
class TransposedCodes(NamedTuple):
    """Sparse codes with their transposition, for the products that share these indices."""

    values: torch.Tensor
    indices: torch.Tensor
    transposition: Transposition


Tensor = torch.Tensor
Maybe = torch.Tensor | None


@overload
def linear_topk(
    x: Tensor, weight: Tensor, bias: Maybe, k: int, *, pre_bias: Maybe = ..., scale: Maybe = ...,
    latents: Maybe = ..., groups: int = ..., relu: bool = ..., sorted: bool = ...,
    return_transposition: Literal[False] = ...,
) -> Codes: ...  # fmt: skip


@overload
def linear_topk(
    x: Tensor, weight: Tensor, bias: Maybe, k: int, *, pre_bias: Maybe = ..., scale: Maybe = ...,
    latents: Maybe = ..., groups: int = ..., relu: bool = ..., sorted: bool = ...,
    return_transposition: Literal[True],
) -> TransposedCodes: ...  # fmt: skip


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
    return_transposition: bool = False,
) -> Codes | TransposedCodes:
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
        return_transposition: also return the transposition of the indices, which this operation's
            backward pass needs anyway, to be given to `sparse_matmul`.

    Returns:
        Codes(values, indices): values [..., k] of x's dtype, differentiable (twice and more) with
        respect to x, weight, bias, pre_bias and scale; indices [..., k] int64. With
        return_transposition, TransposedCodes(values, indices, transposition).

    Raises:
        TypeError: a dtype that does not fit, or k is not an integer.
        ValueError: shapes or devices that do not fit, or k is out of range.
        IndexError: an element of latents outside 0..N-1.

    Note:
        Ranked are the scores in x's dtype, as the dense expression has them; products may differ
        from it in the last bits, so that scores that close may change places. Equal scores are
        ordered by index. Memory: buffers of at most 7 Mi scores (and as many weights, where they
        have to be converted or gathered), and k codes per slice of latents; never [B, N], and
        never [B, k, D] in the backward pass.

    Example:
        >>> import torch, sparsekern
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> values, indices = sparsekern.linear_topk(x, weight, None, 2)
        >>> values.tolist(), indices.tolist()
        ([[1.0, 0.0]], [[0, 2]])
    """
    check_layer("linear_topk", x, weight, bias, pre_bias, scale, latents)
    width = weight.shape[0] if latents is None else latents.shape[0]
    what = "the number of latents" if latents is None else "the size of latents"
    k = check_count("linear_topk", "k", k, width, what)
    groups = check_groups(groups, k, width, latents)
    values, indices, *transposition = _linear_topk(
        x, weight, bias, k, pre_bias, scale, latents, groups, relu, sorted, return_transposition
    )
    if return_transposition:
        return TransposedCodes(values, indices, Transposition(*transposition))
    return Codes(values, indices)


# -- reference -------------------------------------------------------------------------------------


def _centred(x: torch.Tensor, pre_bias: torch.Tensor | None) -> torch.Tensor:
    return x if pre_bias is None else (x - pre_bias).to(x.dtype)


def _transposed(indices: torch.Tensor, n: int, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if wanted:
        return _transpose_codes(indices, n)
    return indices.new_empty(0), indices.new_empty(0, dtype=torch.int32)


def linear_topk_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
    groups: int,
    relu: bool,
    sorted: bool,
    transpose: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_latents(latents, weight.shape[0])

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if latents is None else tensor[latents]).to(x.dtype)

    scores = torch.nn.functional.linear(
        _centred(x, pre_bias), chosen(weight), None if bias is None else chosen(bias)
    )
    if scale is not None:
        scores = scores * chosen(scale)
    grouped = scores.unflatten(-1, (groups, scores.shape[-1] // groups))
    values, indices, _ = topk_reference(grouped, k // groups, sorted, relu, False, False)
    indices = indices + torch.arange(groups, device=x.device).unsqueeze(1) * grouped.shape[-1]
    values, indices = values.flatten(-2), indices.flatten(-2)
    if latents is not None:
        indices = latents[indices]
    return values, indices, *_transposed(indices, weight.shape[0], transpose)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
    groups: int,
    *_: Any,
) -> None:
    check_layer("linear_topk", x, weight, bias, pre_bias, scale, latents)
    width = weight.shape[0] if latents is None else latents.shape[0]
    check_groups(groups, check_count("linear_topk", "k", k, width, "the latents"), width, latents)


# -- in slices -------------------------------------------------------------------------------------


def _slices(backend: str) -> Any:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        k: int,
        pre_bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        latents: torch.Tensor | None,
        groups: int,
        relu: bool,
        sorted: bool,
        transpose: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if x.numel() == 0:
            return linear_topk_reference(
                x, weight, bias, k, pre_bias, scale, latents, groups, relu, sorted, transpose
            )
        check_latents(latents, weight.shape[0])
        select = library.kernels(backend, "topk").topk
        rows = _centred(x.reshape(-1, x.shape[-1]), pre_bias).contiguous()
        values = rows.new_empty(len(rows), k)
        indices = rows.new_empty(len(rows), k, dtype=torch.int64)
        layer = Layer(weight, bias, scale, latents, rows.dtype)
        selection = Selection(k, groups, relu, sorted, select)
        step = rows_at_once(k)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            select_rows(layer, rows[part], selection, values[part], indices[part])
        if latents is not None:
            indices = latents[indices]
        if x.dim() != 2:
            shape = (*x.shape[:-1], k)
            values, indices = values.view(shape), indices.view(shape)
        return values, indices, *_transposed(indices, weight.shape[0], transpose)

    return run


# -- shapes without data ---------------------------------------------------------------------------


def _fake(
    x: Any,
    weight: Any,
    bias: Any,
    k: int,
    pre_bias: Any,
    scale: Any,
    latents: Any,
    groups: int,
    relu: bool,
    sorted: bool,
    transpose: bool,
) -> Any:
    values = x.new_empty(*x.shape[:-1], k)
    indices = values.new_empty(values.shape, dtype=torch.int64)
    offsets = indices.new_empty(weight.shape[0] + 1 if transpose else 0)
    positions = indices.new_empty(indices.numel() if transpose else 0, dtype=torch.int32)
    return values, indices, offsets, positions


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, _, pre_bias, scale, _, _, relu, _, ctx.transposed = inputs
    values, indices, *transposition = output
    ctx.mark_non_differentiable(indices, *transposition)
    passed = passed_by_relu(values) if relu else None
    if not ctx.needs_input_grad[5]:  # scale
        values = None
    ctx.save_for_backward(x, weight, bias, pre_bias, scale, values, passed, indices, *transposition)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    x, weight, bias, pre_bias, scale, values, passed, indices, *transposition = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_pre_bias, need_scale, *_ = ctx.needs_input_grad
    d_x = d_weight = d_bias = d_pre_bias = d_scale = None
    if not ctx.transposed and (need_weight or need_bias or need_scale):
        transposition = list(_transpose_codes(indices, weight.shape[0]))
    elif not ctx.transposed:
        transposition = [None, None]

    def per_latent(terms: torch.Tensor, features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _sparse_matmul_backward(features, terms, indices, like, False, True, *transposition)[
            1
        ]

    def total(terms: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        ones = terms.new_ones(*terms.shape[:-1], 1)
        return per_latent(terms, ones, like.unsqueeze(1)).squeeze(1)

    g = grad if passed is None else torch.where(passed, grad, 0)
    if need_scale:
        factors = scale[indices]
        if passed is not None:  # a score of scale zero is zero, and passes nothing on
            factors = torch.where(passed, factors, 1)
        d_scale = total((g * (values / factors)).to(x.dtype), scale)
    if scale is not None:
        g = (g * scale[indices]).to(x.dtype)
    if need_weight:
        d_weight = per_latent(g, _centred(x, pre_bias), weight)
    if need_bias:
        d_bias = total(g, bias)
    if need_x or need_pre_bias:
        d_x = _sparse_matmul(g, indices, weight, None, *transposition)
        if need_pre_bias:
            d_pre_bias = -matrix_of(d_x).sum(0, dtype=pre_bias.dtype)
    return d_x if need_x else None, d_weight, d_bias, None, d_pre_bias, d_scale, *[None] * 5


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    x, weight, bias, k, pre_bias, scale, *rest = args
    if torch.float64 in (x.dtype, weight.dtype):  # as torch.matmul: autocast leaves float64 alone
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias, pre_bias, scale = (
            None if tensor is None else tensor.to(dtype)
            for tensor in (weight, bias, pre_bias, scale)
        )
    return x.to(dtype), weight, bias, k, pre_bias, scale, *rest


_linear_topk: Callable[..., Any] = library.define(
    "linear_topk",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt k, Tensor? pre_bias, Tensor? scale,"
    " Tensor? latents, SymInt groups, bool relu, bool sorted, bool transpose)"
    " -> (Tensor values, Tensor indices, Tensor offsets, Tensor positions)",
    reference=linear_topk_reference,
    implementations={"native": _slices("native"), "triton": _slices("triton")},
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one(lambda: _linear_topk),
    autocast=_autocast,
)
