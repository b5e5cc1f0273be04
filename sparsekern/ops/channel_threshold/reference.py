"""The definition of channel_threshold in torch."""

from __future__ import annotations

import torch

from ..order import key_of


def channel_threshold_reference(x: torch.Tensor, rank: int, channel_dim: int) -> torch.Tensor:
    columns = x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
    rows = key_of(columns).kthvalue(rank, dim=0).indices
    values = columns.gather(0, rows.unsqueeze(0)).squeeze(0)
    return torch.where(key_of(values) == 0, 0, values)  # -0 as +0
