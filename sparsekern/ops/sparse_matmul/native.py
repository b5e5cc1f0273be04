"""Calls of the native sparse products, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import NO_MATRIX, codes, launch, matrix, new_output, pointer
from ..checks import bad_index
from ..layout import empty_like_dictionary, rows_to_gather
from ..transpose_codes.checks import not_grouped
from ..transpose_codes.native import transpose_codes


def sparse_matmul(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return out [rows, d] of values and indices [rows, k].

    weight is [n, d], row- or column-major, bias [d] or None.
    """
    n, d = weight.shape
    weight = rows_to_gather(weight, values.numel())
    out = values.new_empty(len(values), d)
    wrong = launch(
        "sparse_matmul",
        values,
        codes=codes(values, indices),
        weight=matrix(weight),
        bias=pointer(bias),
        out=out.data_ptr(),
    )
    if wrong >= 0:
        raise bad_index("sparse_matmul", indices, wrong, n)
    return out


def sparse_matmul_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    need_values: bool,
    need_weight: bool,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of values [rows, k] and of weight [n, d], in weight's layout.

    One that is not needed is [0]. grad is [rows, d]; offsets and positions are the transposition of
    the indices, if it is known.
    """
    checked = offsets is not None and indices.is_cpu  # on a GPU the host would have to wait
    if offsets is None or positions is None:
        offsets, positions = transpose_codes(indices, weight.shape[0], "sparse_matmul")
    grad_values = torch.empty_like(values) if need_values else values.new_empty(0)
    grad_weight = empty_like_dictionary(weight, new_output) if need_weight else weight.new_empty(0)
    fits = launch(
        "sparse_matmul_backward",
        grad,
        grad=grad.data_ptr(),
        codes=codes(values, indices if checked else None),
        weight=matrix(weight),
        offsets=offsets.data_ptr(),
        positions=positions.data_ptr(),
        grad_values=grad_values.data_ptr() if need_values else 0,
        grad_weight=matrix(grad_weight) if need_weight else NO_MATRIX,
    )
    if not fits:
        raise not_grouped("sparse_matmul")
    return grad_values, grad_weight
