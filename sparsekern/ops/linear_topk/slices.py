"""The k largest outputs of a linear layer, a slice of latents at a time.

The scores of a slice are one matrix product, into a buffer that every slice uses. The k largest of
a slice are candidates, and the k largest candidates of all slices are the row's k largest. Or a
kernel brings the k largest so far up to date with the next slice: it knows their least, which
hardly any score reaches, and so reads the slice once and does little else. Selections are exact and
order equal scores by latent, and slices come in ascending order of latents, so the result is that
of a selection from all scores at once.

Of few rows a CPU kernel (native.py, `few_rows`) computes all scores and selects from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..block_sizes import cdiv

# Scores held at a time. Wider slices make faster products (bench/ measures them as "linear_topk").
# On a CPU the C library maps blocks of 32 MiB or more anew each time, and the system clears them; a
# GPU is filled by products of 8192 rows and latents.
BUFFER_ELEMENTS = {"cpu": 7 << 20, "cuda": 64 << 20}
SMALLEST_SLICE = 4096
# Terms of all scores below which everything is done at once: a third of a millisecond's.
SMALL_TERMS = 30_000_000
# Float32 rows up to which the kernel of few rows is quicker than torch's product and a selection:
# it reads the weight once for all of them. With more, it depends on the sizes.
FEW_ROWS = 32
CACHE_LINE_ELEMENTS = 64


class Layer:
    """A linear layer whose scores are computed a slice of latents at a time."""

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
        # Elements of each latent's row that are cast or gathered before the product.
        self.copied = weight.shape[1] if latents is not None or weight.dtype != dtype else 0

    def scores(self, rows: torch.Tensor, first: int, last: int, out: torch.Tensor) -> None:
        """Write the scores of latents first..last-1 to out [rows, last - first]."""

        def slice_of(tensor: torch.Tensor) -> torch.Tensor:
            if self.latents is None:
                whole = first == 0 and last == self.width
                return (tensor if whole else tensor[first:last]).to(self.dtype)
            return tensor[self.latents[first:last]].to(self.dtype)

        columns = slice_of(self.weight).t()
        if self.bias is None:
            torch.mm(rows, columns, out=out)
        else:
            torch.addmm(slice_of(self.bias), rows, columns, out=out)
        if self.scale is not None:
            out.mul_(slice_of(self.scale))


class Selection(NamedTuple):
    """The scores to keep of each row: k / groups of each group of consecutive latents.

    select: the backend's topk(x, k, sorted, relu, abs, count).
    running: its class for rows that come in parts, if it has one.
    """

    k: int
    groups: int
    relu: bool
    sorted: bool
    select: Any
    running: Any


def is_small(layer: Layer, rows: torch.Tensor, groups: int) -> bool:
    """Return True if a call does so little that slices and screening would only take time."""
    terms = rows.numel() * layer.width
    return groups == 1 and layer.copied == 0 and terms < SMALL_TERMS


def is_few(layer: Layer, rows: torch.Tensor, groups: int) -> bool:
    """Return True if the kernel of few rows serves a call, where its module has it."""
    weight = layer.weight
    return (
        len(rows) <= FEW_ROWS
        and groups == 1
        and layer.copied == 0
        and rows.dtype == torch.float32
        and (weight.stride(1) == 1 or weight.shape[1] == 1)
        and len(rows) * layer.width <= buffer_elements(rows.device)
    )


def select_at_once(
    layer: Layer, rows: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of rows [count, d] from all their scores."""
    scores = rows.new_empty(len(rows), layer.width)
    layer.scores(rows, 0, layer.width, scores)
    values, indices, _ = selection.select(
        scores, selection.k, selection.sorted, selection.relu, False, False
    )
    return values, indices


def rows_at_once(device: torch.device, k: int) -> int:
    """Return how many rows share a buffer."""
    return max(1, buffer_elements(device) // max(SMALLEST_SLICE, 4 * k))


def buffer_elements(device: torch.device) -> int:
    """Return how many scores are held at a time."""
    return BUFFER_ELEMENTS.get(device.type, BUFFER_ELEMENTS["cpu"])


def select_rows(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of some rows to values and indices [rows, k]."""
    count, k = len(rows), selection.k // selection.groups
    group_width = layer.width // selection.groups
    fitting = buffer_elements(rows.device) // max(count, layer.copied)
    widest = max(SMALLEST_SLICE, 4 * selection.k, fitting)
    width = _slice_width(layer.width, widest)
    buffer = rows.new_empty(count * width)
    if selection.groups > 1 and group_width <= width:
        groups_at_once = width // group_width
        for first in range(0, selection.groups, groups_at_once):
            last = min(first + groups_at_once, selection.groups)
            codes = slice(first * k, last * k)
            _select_groups(
                layer,
                rows,
                selection,
                range(first, last),
                buffer,
                values[:, codes],
                indices[:, codes],
            )
        return
    for group in range(selection.groups):
        codes = slice(group * k, (group + 1) * k)
        _select_range(
            layer, rows, selection, group * group_width, (group + 1) * group_width, buffer,
            values[:, codes], indices[:, codes],
        )  # fmt: skip


def _slice_width(total: int, widest: int) -> int:
    """Return the width of equal slices, at most `widest`; the last one may be narrower.

    Widths are multiples of a cache line where that is possible.
    """
    lines = cdiv(total, cdiv(total, widest) * CACHE_LINE_ELEMENTS)
    return min(total, widest, lines * CACHE_LINE_ELEMENTS)


def _select_groups(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    groups: range,
    buffer: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of some groups whose scores fit into the buffer, each group as a row."""
    count, k = len(rows), selection.k // selection.groups
    group_width = layer.width // selection.groups
    width = len(groups) * group_width
    scores = buffer[: count * width].view(count, width)
    layer.scores(rows, groups.start * group_width, groups.stop * group_width, scores)
    top_values, columns, _ = selection.select(
        scores.view(count * len(groups), group_width),
        k,
        selection.sorted,
        selection.relu,
        False,
        False,
    )
    values.copy_(top_values.view(count, len(groups) * k))
    starts = torch.arange(groups.start, groups.stop, device=rows.device) * group_width
    columns.view(count, len(groups), k).add_(starts.unsqueeze(1))
    indices.copy_(columns.view(count, len(groups) * k))


def _select_range(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    begin: int,
    end: int,
    buffer: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of the latents begin..end-1, found slice by slice."""
    count, k = values.shape
    width = min(len(buffer) // count, end - begin)
    single = width == end - begin
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    running = None
    in_parts = selection.running is not None and selection.running.serves(rows, k, end)
    for first in range(begin, end, width):
        last = min(first + width, end)
        scores = buffer[: count * (last - first)].view(count, last - first)
        layer.scores(rows, first, last, scores)
        if running is None:
            top_values, columns, _ = selection.select(
                scores, min(k, last - first),
                single and selection.sorted, single and selection.relu, False, False,
            )  # fmt: skip
            found.append((top_values, columns.add_(first)))
            if in_parts and not single:
                running = selection.running(*found[0])
        elif last < end:
            running.update(scores, first)
        else:
            found = [running.finish(scores, first, selection.relu and not selection.sorted)]
    if len(found) > 1 or (selection.sorted and not single):
        found = [_first_of(found, k, selection)]
    values.copy_(found[0][0])
    indices.copy_(found[0][1])


def _first_of(
    found: list[tuple[torch.Tensor, torch.Tensor]], k: int, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of the k largest among the codes of slices, which ascend by index."""
    values, columns, _ = selection.select(
        torch.cat([values for values, _ in found], 1),
        k, selection.sorted, selection.relu, False, False,
    )  # fmt: skip
    return values, torch.cat([indices for _, indices in found], 1).gather(1, columns)
