"""The k largest outputs of a float32 layer, from a product in bfloat16 and a bound of its error.

1. x and a slice of the weight are rounded to bfloat16, with the lengths of their rows and of what
   rounding took away. Their product takes a fraction of the time of one in float32.
2. |exact - product| is bounded for each row and latent. Latents whose upper bound lies below the
   k-th largest lower bound cannot be among the k largest; the others, some 2 k a row, are the
   candidates.
3. The candidates' scores are computed in float32 by `gather_dot`'s kernel, each in the same order
   of additions wherever it stands, and the k largest of these are selected.

So the selection is that of all latents' float32 scores in that order, whatever was screened. Rows
with too many candidates (their scores lie closer than bfloat16 can tell) are screened again with a
product in float32, and those that are left (their scores are equal, or not numbers) have all their
scores computed. docs/exact-encoding.md derives the bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...dispatch.launch import launch, matrix, pointer
from ...dispatch.modules import native_module
from ..gather_dot.native import dots_of_listed
from ..topk import native as topk_native
from ..transpose_codes.native import transpose_codes
from .slices import Layer, Selection

# Elements of the scores of a slice, and of the rounded weights it is made from: they share the
# caches.
SLICE_ELEMENTS = 2 << 20
LEAST_WIDTH = 1024
# Candidates of a row, as multiples of k; at least so many.
CANDIDATES_PER_CODE = 16
LEAST_CANDIDATES = 512
# Scores held at a time where all scores of some rows are computed.
EXHAUSTIVE_ELEMENTS = 4 << 20

ROUNDOFF = 2.0**-24  # of float32
SMALLEST = 2.0**-126  # the smallest normal number, also of bfloat16
# Of the bounds' own arithmetic in float32, a dozen operations.
SLACK = 1 + 2.0**-16
# bfloat16 has 8 bits: a result is off by at most half a unit in the last place.
SCORE_ERRORS = {torch.bfloat16: 2.0**-8 / (1 - 2.0**-8), torch.float32: 0.0}
OWN_ERROR = 2.0**-20  # of the additions of a score, its bias and its bound


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


def round_rows(rows: torch.Tensor, buffer: torch.Tensor | None = None) -> Rounded:
    """Round float32 rows [n, d], one of whose strides is 1, into a buffer of bfloat16 numbers."""
    n, d = rows.shape
    if buffer is None:
        buffer = rows.new_empty(n * d, dtype=torch.bfloat16)
    flat = buffer[: n * d]
    columns = d > 1 and rows.stride(1) != 1
    rounded = flat.view(d, n).t() if columns else flat.view(n, d)
    lengths, errors = rows.new_empty(2, n).unbind()
    launch(
        "round_rows",
        rows,
        x=matrix(rows),
        rounded=rounded.data_ptr(),
        lengths=lengths.data_ptr(),
        errors=errors.data_ptr(),
    )
    return Rounded(rounded, lengths, errors)


class Candidates:
    """The latents that may be among the k largest of each row, brought up to date by slices."""

    def __init__(self, count: int, k: int, like: torch.Tensor) -> None:
        self.k = k
        self.capacity = max(LEAST_CANDIDATES, CANDIDATES_PER_CODE * k)
        self.latents = like.new_empty(count, self.capacity, dtype=torch.int32)
        self.lower, self.upper = like.new_empty(2, count, self.capacity).unbind()
        self.counts = like.new_zeros(count, dtype=torch.int32)
        self.thresholds = like.new_full((count,), torch.nan)

    def update(
        self,
        scores: torch.Tensor,
        first: int,
        vectors: tuple[torch.Tensor | None, torch.Tensor | None],
        x: tuple[torch.Tensor, torch.Tensor],
        weight: tuple[torch.Tensor, torch.Tensor],
        depth: int,
        last: bool,
    ) -> None:
        """Take the scores of the next latents.

        Args:
            scores: [rows, width] bfloat16 or float32: products of rows, without bias and scale.
            first: latent of the first column.
            vectors: bias and scale of these latents, or None.
            x: factors [rows] of the weight's lengths and of its errors in the bound.
            weight: at least the lengths of the latents' rows [width], and of their errors.
            depth: terms of a product.
            last: there are no other latents.
        """
        launch(
            "screen_scores",
            scores,
            scores=matrix(scores),
            first=first,
            k=self.k,
            bias=pointer(vectors[0]),
            scale=pointer(vectors[1]),
            x_errors=x[0].data_ptr(),
            x_lengths=x[1].data_ptr(),
            lengths=weight[0].data_ptr(),
            errors=weight[1].data_ptr(),
            score_error=SLACK * (SCORE_ERRORS[scores.dtype] + OWN_ERROR),
            bias_error=OWN_ERROR,
            least_error=(4 * depth + 16) * SMALLEST,
            last=last,
            capacity=self.capacity,
            latents=self.latents.data_ptr(),
            lower=self.lower.data_ptr(),
            upper=self.upper.data_ptr(),
            counts=self.counts.data_ptr(),
            thresholds=self.thresholds.data_ptr(),
        )


def factors_of_bounds(x: Rounded, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors [rows] of the lengths and of the errors of the weight in the bound.

    The sums of both products, the screening one and the float32 one it is compared with, are off by
    at most depth roundings of the sum of magnitudes, in whatever order they are made.
    """
    sums = 2 * (depth + 16) * ROUNDOFF * SLACK
    longest = x.lengths + x.errors
    return (x.errors + sums * longest) * SLACK, longest * ((1 + sums) * SLACK)


def is_quick_here() -> bool:
    """Return True if this CPU multiplies bfloat16 numbers by instructions of its own."""
    module, _ = native_module("cpu")
    return module is not None and bool(module.multiplies_bfloat16())


def pays(rows: int, depth: int, width: int, k: int) -> bool:
    """Return True if screening takes less time than a product in float32, as measured."""
    saved = 9e-12 * rows * width * depth  # seconds of two threads
    cost = 2e-10 * width * depth + 1e-10 * rows * width + rows * 3 * k * (depth * 6e-11 + 4e-9)
    return saved > cost + 1e-4


def serves(layer: Layer, rows: torch.Tensor, selection: Selection) -> bool:
    """Return True if `select_rows` is to select these codes."""
    k, width = selection.k // selection.groups, layer.width // selection.groups
    return (
        rows.is_cpu
        and rows.dtype == torch.float32 == layer.weight.dtype
        and layer.latents is None
        and 1 in layer.weight.stride()
        and CANDIDATES_PER_CODE * k <= width
        and width < 2**31
        and is_quick_here()
        and pays(len(rows), rows.shape[1], width, k)
    )


def select_rows(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of some rows [count, d] to values and indices [count, k]."""
    groups, k = selection.groups, selection.k // selection.groups
    width = layer.width // groups
    rounded = round_rows(rows)
    for group in range(groups):
        latents, codes = range(group * width, (group + 1) * width), slice(group * k, (group + 1) * k)
        _select(layer, rows, rounded, selection._replace(k=k), latents, values[:, codes],
                indices[:, codes])  # fmt: skip


def _select(
    layer: Layer,
    rows: torch.Tensor,
    rounded: Rounded | None,
    selection: Selection,
    latents: range,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of a range of latents, screened by a product in bfloat16 or in float32."""
    candidates = _screen(layer, rows, rounded, selection.k, latents)
    counts = candidates.counts
    crowded = (counts < 0).nonzero().squeeze(1)
    if len(crowded) < len(rows):
        used = int(counts.max())
        chosen = candidates.latents[:, :used]
        listed = torch.arange(used, dtype=torch.int32) < counts.unsqueeze(1)
        _select_listed(layer, rows, selection, chosen, listed, values, indices)
    if len(crowded) == 0:
        return
    part = rows[crowded]
    part_values, part_indices = values[crowded], indices[crowded]
    if rounded is not None:
        _select(layer, part, None, selection, latents, part_values, part_indices)
    else:
        _select_exhaustively(layer, part, selection, latents, part_values, part_indices)
    values[crowded], indices[crowded] = part_values, part_indices


def _screen(
    layer: Layer, rows: torch.Tensor, rounded: Rounded | None, k: int, latents: range
) -> Candidates:
    """Return the candidates among a range of latents; rounded None: by a product in float32."""
    count, depth = rows.shape
    dtype = torch.float32 if rounded is None else torch.bfloat16
    if rounded is None:
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        rounded = Rounded(rows, (lengths * SLACK + depth * SMALLEST).float(), rows.new_zeros(count))
    candidates = Candidates(count, k, rows)
    x = factors_of_bounds(rounded, depth)
    width = min(len(latents), max(LEAST_WIDTH, SLICE_ELEMENTS // max(count, depth)))
    weights = rows.new_empty(width * depth, dtype=torch.bfloat16)
    buffer = rows.new_empty(count * width, dtype=dtype)
    for first in range(latents.start, latents.stop, width):
        last = min(first + width, latents.stop)
        weight = layer.weight[first:last]
        low = round_rows(weight, weights)
        errors = low.errors if dtype == torch.bfloat16 else torch.zeros_like(low.errors)
        scores = buffer[: count * (last - first)].view(count, last - first)
        columns = low.rows if dtype == torch.bfloat16 else weight
        torch.mm(rounded.rows, columns.t(), out=scores)
        vectors = layer.bias, layer.scale
        bias, scale = (None if v is None else v[first:last].contiguous() for v in vectors)
        candidates.update(
            scores, first, (bias, scale), x, (low.lengths, errors), depth, last == latents.stop
        )
    return candidates


def _select_listed(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: torch.Tensor,
    listed: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes among some latents of each row [count, used], where `listed`, by ascending.

    Rows with none are left alone.
    """
    filled = torch.where(listed, latents, 0)
    places = listed.view(-1).nonzero().squeeze(1).to(torch.int32)
    offsets, order = transpose_codes(filled[listed], len(layer.weight), "linear_topk")
    scores = dots_of_listed(rows, layer.weight, filled, offsets, places[order])
    for vector, combine in ((layer.bias, scores.add_), (layer.scale, scores.mul_)):
        if vector is not None:
            combine(vector[filled])
    scores.masked_fill_(~listed, -torch.inf)
    _take(scores, filled, selection, listed[:, 0], values, indices)


def _take(
    scores: torch.Tensor,
    latents: torch.Tensor,
    selection: Selection,
    written: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the k largest of exact scores [count, used], whose latents ascend, where `written`."""
    top_values, columns, _ = topk_native.topk(
        scores, selection.k, selection.sorted, selection.relu, False, False
    )
    top_indices = latents.gather(1, columns).long()
    if bool(written.all()):
        values.copy_(top_values)
        indices.copy_(top_indices)
    else:
        values[written], indices[written] = top_values[written], top_indices[written]


def _select_exhaustively(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: range,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of rows whose scores of all latents of a range are computed one by one."""
    width = len(latents)
    every = torch.arange(latents.start, latents.stop, dtype=torch.int32)
    step = max(1, EXHAUSTIVE_ELEMENTS // width)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = every.expand(len(rows[part]), width)
        listed = torch.ones_like(chosen, dtype=torch.bool)
        _select_listed(layer, rows[part], selection, chosen, listed, values[part], indices[part])
