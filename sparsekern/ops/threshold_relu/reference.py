"""The definition of threshold_relu and threshold_codes in torch."""

from __future__ import annotations

import math

import torch

from ..channels import across, channel_sum, channels_of, placed_like
from ..layout import sum_dtype


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the dtype that the operations compute in."""
    return tensor.to(sum_dtype(tensor.dtype))


def _excess(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z - t, and True where z is not <= t."""

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(wide(x).dtype), x.dim(), dim)

    z = wide(x)
    if scale is not None and shift is not None:
        z = z * broadcast(scale) + broadcast(shift)
    t = broadcast(threshold)
    return z - t, (z <= t).logical_not()


def threshold_relu_reference(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    excess, active = _excess(x, threshold, scale, shift, channel_dim)
    counts = channel_sum(active.long(), channel_dim)
    return placed_like(torch.where(active, excess, 0), x, channel_dim), counts


def threshold_codes_reference(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    excess, active = _excess(x, threshold, scale, shift, channel_dim)
    indices = active.reshape(-1).nonzero().view(-1)
    channels = x.shape[channel_dim]
    code_channels = channels_of(indices, channels, math.prod(x.shape[channel_dim + 1 :]))
    counts = torch.bincount(code_channels, minlength=channels)
    return excess.reshape(-1)[indices].to(x.dtype), indices, counts
