"""Float32 rows rounded to bfloat16, with bounds of what that took."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rounded(NamedTuple):
    """Float32 rows in bfloat16, and bounds of what rounding took.

    Attributes:
        rows: [n, d] bfloat16.
        lengths: [n] float32, at least the Euclidean norms of the float32 rows.
        errors: [n] float32, at least the norms of the differences.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    errors: torch.Tensor

    def part(self, first: int, last: int) -> Rounded:
        """Return rows first..last-1."""
        return Rounded(self.rows[first:last], self.lengths[first:last], self.errors[first:last])


def room_for(rows: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Return room for rows [n, d] as bfloat16, in their order and without gaps.

    rows: one stride is 1. buffer: at least n * d bfloat16 numbers in a row, to be used for it.
    """
    n, d = rows.shape
    if buffer is None:
        buffer = rows.new_empty(n * d, dtype=torch.bfloat16)
    flat = buffer[: n * d]
    columns = d > 1 and rows.stride(1) != 1
    return flat.view(d, n).t() if columns else flat.view(n, d)
