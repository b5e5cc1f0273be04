"""The k largest outputs of a linear layer, a slice of latents at a time.

The latents are taken in slices. Each slice's scores are a product of the vendor's library into
one buffer that is used again for the next; what a slice can contribute to a row are its own k
largest, and the k largest of these over all slices are the row's. Both selections are exact and in
the total order, slices come in ascending order of latents, so the result is the one definite set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# Scores held at a time. Fewer slices make better products, measured in bench/ as "linear_topk"; but
# blocks of 32 MiB or more are mapped anew by the C library, and cleared by the system, each time.
BUFFER_ELEMENTS = 7 << 20
SMALLEST_SLICE = 4096
WIDTH_STEP = 64


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
        # elements of a latent's row that a slice has to copy first
        self.copied = weight.shape[1] if latents is not None or weight.dtype != dtype else 0

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


class Selection(NamedTuple):
    """What to keep of each row: k / groups scores of each group of consecutive latents.

    select: the backend's topk(x, k, sorted, relu, abs, count).
    """

    k: int
    groups: int
    relu: bool
    sorted: bool
    select: Any


def rows_at_once(k: int) -> int:
    """How many rows share a buffer."""
    return max(1, BUFFER_ELEMENTS // max(SMALLEST_SLICE, 4 * k))


def select_rows(
    layer: Layer,
    rows: torch.Tensor,
    wanted: Selection,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Codes of some rows, into values and indices [rows, k]."""
    count, k = len(rows), wanted.k // wanted.groups
    group = layer.width // wanted.groups
    most = max(SMALLEST_SLICE, 4 * wanted.k, BUFFER_ELEMENTS // max(count, layer.copied))
    width = _even(layer.width, most)
    buffer = rows.new_empty(count * width)
    if wanted.groups > 1 and group <= width:
        whole = width // group
        for first in range(0, wanted.groups, whole):
            last = min(first + whole, wanted.groups)
            codes = slice(first * k, last * k)
            _select_groups(
                layer, rows, wanted, range(first, last), buffer, values[:, codes], indices[:, codes]
            )
        return
    for at in range(wanted.groups):
        codes = slice(at * k, (at + 1) * k)
        _select_range(
            layer, rows, wanted, at * group, (at + 1) * group, buffer,
            values[:, codes], indices[:, codes],
        )  # fmt: skip


def _even(total: int, most: int) -> int:
    """The width of slices of at most so many latents that are equally wide, up to a cache line."""
    slices = -(-total // most)
    return min(total, most, -(-total // (slices * WIDTH_STEP)) * WIDTH_STEP)


def _select_groups(
    layer: Layer,
    rows: torch.Tensor,
    wanted: Selection,
    groups: range,
    buffer: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Codes of some groups whose scores fit into the buffer: a group of a row is a row."""
    count, k = len(rows), wanted.k // wanted.groups
    group = layer.width // wanted.groups
    scores = buffer[: count * len(groups) * group].view(count, len(groups) * group)
    layer.scores(rows, groups.start * group, groups.stop * group, scores)
    found, where, _ = wanted.select(
        scores.view(count * len(groups), group), k, wanted.sorted, wanted.relu, False, False
    )
    values.copy_(found.view(count, len(groups) * k))
    starts = torch.arange(groups.start, groups.stop, device=rows.device) * group
    where.view(count, len(groups), k).add_(starts.unsqueeze(1))
    indices.copy_(where.view(count, len(groups) * k))


def _select_range(
    layer: Layer,
    rows: torch.Tensor,
    wanted: Selection,
    begin: int,
    end: int,
    buffer: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Codes of the latents begin..end-1, slice by slice."""
    count, k = values.shape
    width = min(len(buffer) // count, end - begin)
    slice_values: list[torch.Tensor] = []
    slice_indices: list[torch.Tensor] = []
    single = width == end - begin
    for first in range(begin, end, width):
        last = min(first + width, end)
        scores = buffer[: count * (last - first)].view(count, last - first)
        layer.scores(rows, first, last, scores)
        found, where, _ = wanted.select(
            scores, min(k, last - first), single and wanted.sorted, single and wanted.relu,
            False, False,
        )  # fmt: skip
        slice_values.append(found)
        slice_indices.append(where.add_(first))
    if single:
        values.copy_(slice_values[0])
        indices.copy_(slice_indices[0])
        return
    found, where, _ = wanted.select(
        torch.cat(slice_values, 1), k, wanted.sorted, wanted.relu, False, False
    )
    values.copy_(found)
    indices.copy_(torch.cat(slice_indices, 1).gather(1, where))
