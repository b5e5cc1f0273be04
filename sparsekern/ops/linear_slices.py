"""The k largest outputs of a linear layer, a slice of latents at a time.

The latents are taken in slices. Each slice's scores are a product of the vendor's library into
one buffer that is used again for the next; what a slice can contribute to a row are its own k
largest, and the k largest of these over all slices are the row's. Both selections are exact and in
the total order, slices come in ascending order of latents, so the result is the one definite set.
"""

from __future__ import annotations

from typing import Any

import torch

# Scores held at a time. Fewer slices make better products; measured in bench/ as "linear_topk".
BUFFER_ELEMENTS = 8 << 20
SMALLEST_SLICE = 4096


class Layer:
    """The linear layer, a slice of latents at a time."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        latents: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.bias, self.scale = weight, bias, scale
        self.latents = latents
        self.dtype = dtype
        self.width = weight.shape[0] if latents is None else latents.shape[0]

    def scores(self, rows: torch.Tensor, first: int, last: int, out: torch.Tensor) -> None:
        """Write the scores of latents first..last-1 to out [rows, last - first]."""

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if self.latents is None:
                return tensor[first:last].to(self.dtype)
            return tensor[self.latents[first:last]].to(self.dtype)

        columns = cut(self.weight).t()
        if self.bias is None:
            torch.mm(rows, columns, out=out)
        else:
            torch.addmm(cut(self.bias), rows, columns, out=out)
        if self.scale is not None:
            out.mul_(cut(self.scale))


def rows_at_once(k: int) -> int:
    """How many rows share a buffer."""
    return max(1, BUFFER_ELEMENTS // max(SMALLEST_SLICE, 4 * k))


def select_rows(
    layer: Layer,
    rows: torch.Tensor,
    k: int,
    relu: bool,
    sorted: bool,
    select: Any,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Codes of some rows, into values and indices [rows, k]."""
    count = len(rows)
    width = min(layer.width, max(SMALLEST_SLICE, 4 * k, BUFFER_ELEMENTS // count))
    buffer = rows.new_empty(count * width)
    if width == layer.width:
        scores = buffer.view(count, width)
        layer.scores(rows, 0, width, scores)
        values[:], indices[:], _ = select(scores, k, sorted, relu, False, False)
        return
    starts = range(0, layer.width, width)
    kept = [min(k, layer.width - first) for first in starts]
    slice_values = rows.new_empty(count, sum(kept))
    slice_indices = indices.new_empty(count, sum(kept))
    place = 0
    for first, keep in zip(starts, kept, strict=True):
        last = min(first + width, layer.width)
        scores = buffer[: count * (last - first)].view(count, last - first)
        layer.scores(rows, first, last, scores)
        found, where, _ = select(scores, min(keep, last - first), False, False, False, False)
        end = place + found.shape[1]
        slice_values[:, place:end] = found
        torch.add(where, first, out=slice_indices[:, place:end])
        place = end
    values[:], where, _ = select(slice_values, k, sorted, relu, False, False)
    torch.gather(slice_indices, 1, where, out=indices)
