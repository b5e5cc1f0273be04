"""The definition of batch_norm and its gradient in torch."""

from __future__ import annotations

import torch

from ..channels import across, channel_sum, placed_like
from ..layout import sum_dtype


def batch_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = sum_dtype(x.dtype)
    wide = x.to(dtype)
    n = x.numel() // x.shape[channel_dim]

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(dtype), x.dim(), channel_dim)

    def mean_of(tensor: torch.Tensor) -> torch.Tensor:
        return channel_sum(tensor, channel_dim) / n

    mean = mean_of(wide)
    mean = mean + mean_of(wide - broadcast(mean))  # corrected: the first sum is rounded by more
    deviation = wide - broadcast(mean)
    var = mean_of(deviation.square())
    z = deviation * broadcast((var + eps).rsqrt())
    if weight is not None:
        z = z * broadcast(weight)
    if bias is not None:
        z = z + broadcast(bias)
    return placed_like(z, x, channel_dim), mean, var


def batch_norm_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = x.numel() // x.shape[channel_dim]

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(mean.dtype), x.dim(), channel_dim)

    wide = grad.to(mean.dtype)
    inverse_std = (var + eps).rsqrt()
    normalised = (x.to(mean.dtype) - broadcast(mean)) * broadcast(inverse_std)
    grad_bias = channel_sum(wide, channel_dim)
    grad_weight = channel_sum(wide * normalised, channel_dim)
    grad_x = (
        wide - broadcast(grad_bias / n) - normalised * broadcast(grad_weight / n)
    ) * broadcast(inverse_std)
    if weight is not None:
        grad_x = grad_x * broadcast(weight)
    return placed_like(grad_x, x, channel_dim), grad_weight, grad_bias
