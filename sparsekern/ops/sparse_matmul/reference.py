"""The definition of the product and its gradients in torch."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_range
from ..layout import empty_like_dictionary, matrix_of, sum_dtype


def sparse_matmul_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *_transposition: Any,
) -> torch.Tensor:
    check_range("sparse_matmul", indices, weight.shape[0])
    dtype = sum_dtype(values.dtype)
    out = torch.einsum("...k,...kd->...d", values.to(dtype), weight[indices.long()].to(dtype))
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(values.dtype).contiguous()


def sparse_matmul_backward_reference(
    grad: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    need_values: bool,
    need_weight: bool,
    *_transposition: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, d = weight.shape
    check_range("sparse_matmul", indices, n)
    dtype = sum_dtype(values.dtype)
    grad_values, grad_weight = values.new_empty(0), weight.new_empty(0)
    if need_values:
        gathered = weight[indices.long()].to(dtype)
        grad_values = torch.einsum("...d,...kd->...k", grad.to(dtype), gathered)
        grad_values = grad_values.to(values.dtype).contiguous()
    if need_weight:
        terms = torch.einsum("...k,...d->...kd", values.to(dtype), grad.to(dtype))
        terms = matrix_of(terms)
        grad_weight = empty_like_dictionary(weight)
        grad_weight.copy_(terms.new_zeros(n, d).index_add(0, indices.reshape(-1).long(), terms))
    return grad_values, grad_weight
