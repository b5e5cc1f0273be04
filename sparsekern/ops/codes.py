"""Sparse codes, as selections return them and products take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

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
