"""Layouts of matrices in memory, and the dtype of sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which operations on this one accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix_of(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape a tensor [..., d] to [rows, d]; unlike reshape(-1, d), for d = 0 as well."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def column_major(weight: torch.Tensor) -> bool:
    """Return True for the transposed view of a row-major [D, N] matrix.

    Such is the dictionary [N, D] of an nn.Linear(N, D), whose weight is [D, N].
    """
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0] and weight.shape[1] > 1


def empty_like_dictionary(
    weight: torch.Tensor, new: Callable[..., torch.Tensor] = torch.Tensor.new_empty
) -> torch.Tensor:
    """Return an empty tensor in weight's layout, made by new(weight, *shape).

    It is column-major where weight is a transposed view, else row-major.
    """
    n, d = weight.shape
    if column_major(weight):
        return new(weight, d, n).t()
    return new(weight, n, d)


def contiguous_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor [..., d] as a contiguous matrix [rows, d], itself where it is one."""
    if tensor.dim() != 2:
        tensor = matrix_of(tensor)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def unit_stride(weight: torch.Tensor) -> torch.Tensor:
    """Return weight itself where one of its strides is 1, else a contiguous copy."""
    return weight if weight.stride(1) == 1 or column_major(weight) else weight.contiguous()


def rows_to_gather(weight: torch.Tensor, gathered: int) -> torch.Tensor:
    """Return a dictionary [N, D] for a product that gathers so many of its rows on a GPU.

    A copy with neighbouring features is made of a column-major one, if each row is gathered once on
    average: then the copy costs a small part of what it saves.
    """
    if weight.is_cuda and column_major(weight) and gathered >= weight.shape[0]:
        return weight.contiguous()
    return weight
