"""Checks of the arguments of batch_norm and its gradient."""

from __future__ import annotations

import torch

from ..channels import check_channels, check_constants
from ..checks import check_like
from ..layout import sum_dtype


def check_batch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> int:
    """Check the arguments of `batch_norm`; return the dimension of the channels, from 0."""
    dim = check_channels("batch_norm", x, channel_dim)
    if x.numel() == 0:
        raise ValueError(f"batch_norm: x must not be empty, got shape {list(x.shape)}")
    check_constants("batch_norm", x, dim, weight=weight, bias=bias)
    return dim


def check_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channel_dim: int,
) -> None:
    """Check the arguments of the gradient of `batch_norm`."""
    check_batch(x, weight, None, eps, channel_dim)
    check_like("batch_norm", "grad", grad, x, x.shape)
    for name, tensor in (("mean", mean), ("var", var)):
        size = (x.shape[channel_dim],)
        check_like("batch_norm", name, tensor, x.new_empty(0, dtype=sum_dtype(x.dtype)), size)
