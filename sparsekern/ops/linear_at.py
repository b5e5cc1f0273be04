"""Scores of a linear layer at given latents of each row.

Gradients reach a layer through them when its latents were selected elsewhere.

Definition, with the indices held constant:

    scores[b, j] = ((x[b] - pre_bias) . weight[indices[b, j]] + bias[indices[b, j]])
                   * scale[indices[b, j]]

Written with the products of sparse_matmul, so that every backend shares it, no [B, N] and no
[B, k, D] is ever made, and gradients of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch

from .checks import autocasting, check_codes
from .codes import Transposition
from .gather_dot.operation import gather_dot
from .linear_topk.checks import check_layer
from .linear_topk.operation import autocast_layer, layer_gradients
from .linear_topk.reference import centred
from .topk.operation import passed_by_relu
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


def codes_at(
    values: torch.Tensor,
    chosen: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    indices: torch.Tensor,
    transposition: Transposition,
    *,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the codes of latents whose scores a search has found, with their gradients.

    Equivalent PyTorch, but for the rounding of what is computed again::

        torch.where(chosen, linear_at(x, weight, bias, indices, ...).relu(), 0)

    Args:
        values: [..., k], the scores.
        chosen: bool [..., k]; codes that are not chosen are zero.
        x: [..., D], as the other arguments and dtypes those of `linear_at`.
        weight: [N, D].
        bias: [N] or None.
        indices: [..., k].
        transposition: of the indices.
        pre_bias: [D] or None.
        scale: [N] or None.

    Returns:
        [..., k] of values' dtype.
    """
    layer: tuple[Any, ...] = (x, weight, bias, pre_bias, scale)
    if autocasting(x) and x.dtype != torch.float64:
        x, weight, bias, _, pre_bias, scale = autocast_layer(
            (x, weight, bias, None, pre_bias, scale), torch.get_autocast_dtype(x.device.type)
        )
        layer = (x, weight, bias, pre_bias, scale)
    codes: torch.Tensor = _CodesAt.apply(values, chosen, indices, *transposition, *layer)  # type: ignore[no-untyped-call]
    return codes


class _CodesAt(torch.autograd.Function):
    @staticmethod
    def forward(
        values: torch.Tensor,
        chosen: torch.Tensor,
        indices: Any,
        offsets: Any,
        positions: Any,
        *_: Any,
    ) -> torch.Tensor:
        return torch.where(chosen, values.relu(), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, *codes_and_layer = inputs
        needs_scale = ctx.needs_input_grad[-1]
        ctx.save_for_backward(
            output if needs_scale else None, passed_by_relu(output), *codes_and_layer
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        values, passed, indices, offsets, positions, *layer = ctx.saved_tensors
        gradients = layer_gradients(
            grad, layer, values, passed, indices, (offsets, positions), ctx.needs_input_grad[5:]
        )
        return *[None] * 5, *gradients


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
