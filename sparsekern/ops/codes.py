"""Sparse codes, as selections return them and products take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import in_range
from .exported import exported


@exported("sparsekern.ops.topk.Codes")
class Codes(NamedTuple):
    """Sparse codes: values [..., k] and indices int64 [..., k]."""

    values: torch.Tensor
    indices: torch.Tensor


@exported("sparsekern.ops.transposition.Transposition")
class Transposition(NamedTuple):
    """Codes grouped by latent: offsets int64 [N + 1], positions int32 [codes].

    positions[offsets[i] : offsets[i + 1]] are the flat positions of the codes with index i,
    ascending.
    """

    offsets: torch.Tensor
    positions: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Number of codes of each latent: int64 [N]."""
        return self.offsets.diff()


def shift_by_entry(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Return indices [B, ...] with b * n added to those of entry b, -1 for those outside 0..n-1.

    Shifted, such an index could be one of another entry.
    """
    shifts = torch.arange(len(indices), device=indices.device) * n
    shifted = indices + shifts.view(-1, *[1] * (indices.dim() - 1))
    return torch.where(in_range(indices, n), shifted, -1)
