"""The definition of batch_topk in torch."""

from __future__ import annotations

import torch

from ..order import key_of


def batch_topk_reference(
    x: torch.Tensor, total: int, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1)
    key = key_of(flat)
    positions = key.sort(descending=True, stable=True).indices[:total].sort().values
    values = flat[positions]
    if relu:
        values = torch.where(values <= 0, 0, values)
    masked = torch.zeros_like(flat).scatter(0, positions, values)
    return masked.view(x.shape), values, positions
