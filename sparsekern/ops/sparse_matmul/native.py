"""Calls of the native sparse products, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import DTYPE_TAGS, INDEX_TAGS, launch, new_output, pointer
from ..checks import bad_index
from ..layout import empty_like_dictionary
from ..transpose_codes.checks import not_grouped
from ..transpose_codes.native import transpose_codes


def sparse_matmul(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """values, indices [rows, k], weight [n, d] row- or column-major, bias [d] or None -> out [rows,
    d]."""
    rows, k = values.shape
    n, d = weight.shape
    out = values.new_empty(rows, d)
    wrong = launch(
        "sparse_matmul",
        values,
        values.data_ptr(),
        DTYPE_TAGS[values.dtype],
        indices.data_ptr(),
        INDEX_TAGS[indices.dtype],
        rows,
        k,
        weight.data_ptr(),
        DTYPE_TAGS[weight.dtype],
        n,
        d,
        *weight.stride(),
        pointer(bias),
        out.data_ptr(),
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
    """grad [rows, d] -> gradients of values [rows, k] and of weight [n, d] in weight's layout; [0]
    where not needed. offsets and positions: the indices' transposition, if it is known."""
    rows, k = values.shape
    n, d = weight.shape
    checked = offsets is not None and indices.is_cpu  # a GPU's module would have to wait to tell
    if offsets is None or positions is None:
        offsets, positions = transpose_codes(indices, n)
    grad_values = torch.empty_like(values) if need_values else values.new_empty(0)
    grad_weight = empty_like_dictionary(weight, new_output) if need_weight else weight.new_empty(0)
    fits = launch(
        "sparse_matmul_backward",
        grad,
        grad.data_ptr(),
        DTYPE_TAGS[grad.dtype],
        values.data_ptr(),
        rows,
        k,
        weight.data_ptr(),
        DTYPE_TAGS[weight.dtype],
        n,
        d,
        *weight.stride(),
        offsets.data_ptr(),
        positions.data_ptr(),
        indices.data_ptr() if checked else 0,
        INDEX_TAGS[indices.dtype],
        grad_values.data_ptr() if need_values else 0,
        grad_weight.data_ptr() if need_weight else 0,
        *(grad_weight.stride() if need_weight else (0, 0)),
    )
    if not fits:
        raise not_grouped("sparse_matmul")
    return grad_values, grad_weight
