"""How matrices lie in memory, and the dtype that sums run in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which operations on this one accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [..., d] as [rows, d]; d may be 0, of which reshape(-1, d) makes nothing."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def column_major(weight: torch.Tensor) -> bool:
    """True for the transposed view of a row-major [D, N] matrix, as of an nn.Linear(N,
    D).weight."""
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0] and weight.shape[1] > 1


def empty_like_dictionary(
    weight: torch.Tensor, new: Callable[..., torch.Tensor] = torch.Tensor.new_empty
) -> torch.Tensor:
    """An empty tensor in weight's layout: column-major for a transposed view, else row-major; made
    by new(weight, *shape)."""
    n, d = weight.shape
    if column_major(weight):
        return new(weight, d, n).t()
    return new(weight, n, d)
