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
    kind = sum_dtype(x.dtype)
    wide = x.to(kind)
    n = x.numel() // x.shape[channel_dim]

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(kind), x.dim(), channel_dim)

    def mean_of(tensor: torch.Tensor) -> torch.Tensor:
        return channel_sum(tensor, channel_dim) / n

    mean = mean_of(wide)
    mean = mean + mean_of(wide - spread(mean))  # a large sum is rounded by more than a small one
    away = wide - spread(mean)
    var = mean_of(away.square())
    z = away * spread((var + eps).rsqrt())
    if weight is not None:
        z = z * spread(weight)
    if bias is not None:
        z = z + spread(bias)
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

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(mean.dtype), x.dim(), channel_dim)

    wide = grad.to(mean.dtype)
    root = (var + eps).rsqrt()
    standard = (x.to(mean.dtype) - spread(mean)) * spread(root)
    of_bias = channel_sum(wide, channel_dim)
    of_weight = channel_sum(wide * standard, channel_dim)
    of_x = (wide - spread(of_bias / n) - standard * spread(of_weight / n)) * spread(root)
    if weight is not None:
        of_x = of_x * spread(weight)
    return placed_like(of_x, x, channel_dim), of_weight, of_bias
