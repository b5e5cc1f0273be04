"""The k largest outputs of a float32 layer, from a product in bfloat16 and a bound of its error.

1. x and a slice of the weight are rounded to bfloat16, with the lengths of their rows and of what
   rounding took away. Their product takes a third of the time of one in float32.
2. |exact - product| is bounded for each row and latent. Latents whose upper bound lies below the
   k-th largest lower bound cannot be among the k largest; the others, some 2 k a row, are the
   candidates.
3. The candidates' scores are computed in float32 by `gather_dot`'s kernel, each in the same order
   of additions wherever it stands, and the k largest of these are selected.

So the selection is that of all latents' float32 scores in that order, whatever was screened. Rows
with too many candidates (their scores lie closer than bfloat16 can tell) are screened again by a
product in float32, and those that are left (their scores are equal, or not numbers) have all their
scores computed. docs/how-encoding-is-exact.md derives the bounds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ...dispatch.backends import new_choices
from ...dispatch.launch import launch, matrix, pointer
from ...dispatch.modules import native_module
from ..gather_dot.native import dots_of_listed
from ..topk import native as topk_native
from ..transpose_codes.native import transpose_codes
from .rounded import Rounded, kept_copy, round_rows
from .slices import Layer, Selection

# Elements of the scores of a slice, and of the rounded weights it is made from: they share the
# caches.
SLICE_ELEMENTS = 2 << 20
LEAST_WIDTH = 1024
# Candidates of a row that there is room for, as multiples of k; at least so many.
CANDIDATES_PER_CODE = 16
LEAST_CANDIDATES = 512
MOST_LATENTS = 2**31
# Share of rows with too many candidates after the first slice, from which on all rows are done in
# full precision.
MOST_CROWDED = 0.25
# Scores held at a time where all scores of some rows are computed.
EXHAUSTIVE_ELEMENTS = 4 << 20

ROUNDOFF = 2.0**-24  # of float32
SMALLEST = 2.0**-126  # the smallest normal number, also of bfloat16
# bfloat16 has 8 bits: a result is off by at most half a unit in the last place.
SCORE_ERRORS = {torch.bfloat16: 2.0**-8 / (1 - 2.0**-8), torch.float32: 0.0}
# For the bounds' own arithmetic: of factors, and of the sum of a score, its bias and its bound.
SLACK = 1 + 2.0**-16
OWN_ERROR = 2.0**-20

# What both ways take, in nanoseconds of two threads of an EPYC of 2023; only ratios matter.
NANOSECONDS = {
    "weight": 0.27,  # an element that is read from memory, and rounded
    "cached weight": 0.06,  # the same of a weight that fits the caches
    "float32": 0.0115,  # a term of a product
    "bfloat16": 0.005,
    "score": 0.7,
    "candidate": 26,
    "term": 0.073,  # of a candidate's product
    "call": 350e3,  # beyond what one in float32 takes
}
CACHED_ELEMENTS = 4 << 20
KEPT_READING = 0.4  # reading a rounded copy, of the time of reading and rounding the weight
CANDIDATES_EXPECTED = 2.5  # as multiples of k


def select_rows(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> bool:
    """Write the codes of some rows [count, d] to values and indices [count, k].

    Returns:
        False, with nothing written, where screening cannot serve or does not pay.
    """
    groups, k = selection.groups, selection.k // selection.groups
    width = layer.width // groups
    if not _serves(layer, rows, k, width):
        return False
    kept = kept_copy(layer.weight)
    if not pays(len(rows), rows.shape[1], width, k, kept is not None):
        return False
    product = Product(layer, rows, torch.bfloat16, kept)
    for group in range(groups):
        latents = range(group * width, (group + 1) * width)
        codes = slice(group * k, (group + 1) * k)
        _select(product, selection._replace(k=k), latents, values[:, codes], indices[:, codes])
    return True


def _serves(layer: Layer, rows: torch.Tensor, k: int, width: int) -> bool:
    return (
        rows.is_cpu
        and rows.dtype == torch.float32 == layer.weight.dtype
        and layer.latents is None
        and 1 in layer.weight.stride()
        and CANDIDATES_PER_CODE * k <= width < MOST_LATENTS
        and is_quick_here()
        and _is_enabled()
    )


def is_quick_here() -> bool:
    """Return True if this CPU multiplies bfloat16 numbers by instructions of its own."""
    if not _quick:
        module, _ = native_module("cpu")
        _quick["cpu"] = bool(getattr(module, "multiplies_bfloat16", lambda: False)())
    return _quick["cpu"]


_quick: dict[str, bool] = new_choices()
_asked: list[bool] = []


def screening(enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Let `linear_topk` screen float32 layers inside the `with` block, or not.

    By default it does where that is measured to pay, and the environment variable
    SPARSEKERN_SCREENING=0 turns it off. With and without it, the k largest scores are selected; the
    last bits of the values, and the order of scores that differ by no more, are those of another
    order of additions. The choice holds for the whole process.

    Raises:
        TypeError: enabled is no bool.

    Example:
        >>> import torch, sparsekern
        >>> with sparsekern.screening(False):
        ...     codes = sparsekern.linear_topk(torch.randn(9, 64), torch.randn(99, 64), None, 8)
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"screening: enabled must be a bool, got {enabled!r}")
    return _asked_for(enabled)


@contextlib.contextmanager
def _asked_for(enabled: bool) -> Iterator[None]:
    _asked.append(enabled)
    try:
        yield
    finally:
        _asked.pop()


def _is_enabled() -> bool:
    if _asked:
        return _asked[-1]
    return os.environ.get("SPARSEKERN_SCREENING", "1") != "0"


def pays(rows: int, depth: int, width: int, k: int, kept: bool) -> bool:
    """Return True if screening takes less time than a product in float32, by a model of both.

    kept: the weight is rounded already.
    """
    weights = width * depth
    cached = weights <= CACHED_ELEMENTS
    reading = NANOSECONDS["cached weight" if cached else "weight"] * weights
    exact = reading * min(rows, 2) + NANOSECONDS["float32"] * rows * weights
    screened = (
        reading * (KEPT_READING if kept else 1)
        + NANOSECONDS["bfloat16"] * rows * weights
        + NANOSECONDS["score"] * rows * width
        + (NANOSECONDS["candidate"] + NANOSECONDS["term"] * depth) * CANDIDATES_EXPECTED * rows * k
        + NANOSECONDS["call"]
    )
    return screened < exact


class Product:
    """Scores of some rows without bias and scale, known up to an error.

    Args:
        layer: its weight is float32.
        rows: [count, d] float32.
        dtype: bfloat16, in which both are rounded first, or float32.
        kept: the rounded weight, if it is at hand.

    Attributes:
        factors: [count] float32 each: of the lengths and of the errors of a latent in the bound of
            its error.
    """

    def __init__(
        self, layer: Layer, rows: torch.Tensor, dtype: torch.dtype, kept: Rounded | None = None
    ) -> None:
        self.layer, self.rows, self.dtype, self.kept = layer, rows, dtype, kept
        self._left = self._operand(rows, round_rows(rows))
        self.factors = factors_of_bounds(self._left, rows.shape[1])

    def _operand(self, rows: torch.Tensor, rounded: Rounded) -> Rounded:
        if self.dtype == torch.bfloat16:
            return rounded
        return Rounded(rows, rounded.lengths, torch.zeros_like(rounded.errors))

    def write(self, latents: range, out: torch.Tensor, buffer: torch.Tensor) -> Rounded:
        """Write the scores of some latents; return their rows of the weight as they were used.

        out: [count, latents] of the dtype. buffer: for their rounded rows.
        """
        weight = self.layer.weight[latents.start : latents.stop]
        if self.kept is None:
            rounded = round_rows(weight, buffer)
        else:
            rounded = self.kept.part(latents.start, latents.stop)
        right = self._operand(weight, rounded)
        torch.mm(self._left.rows, right.rows.t(), out=out)
        return right


def factors_of_bounds(x: Rounded, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors [rows] of the lengths and of the errors of the weight in the bound.

    The sums of both products, the screening one and the float32 one it is compared with, are off by
    at most depth roundings of the sum of magnitudes, in whatever order they are made.
    """
    sums = 2 * (depth + 16) * ROUNDOFF * SLACK
    longest = x.lengths + x.errors
    return (x.errors + sums * longest) * SLACK, longest * ((1 + sums) * SLACK)


class Candidates:
    """The latents that may be among the k largest of each row, brought up to date by slices.

    Attributes:
        latents: [rows, capacity] int32, ascending; the first ones are valid.
        counts: [rows] int32, how many; -1 where there were too many.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.capacity = max(LEAST_CANDIDATES, CANDIDATES_PER_CODE * k)
        self.latents = torch.empty(rows, self.capacity, dtype=torch.int32)
        self.lower, self.upper = torch.empty(2, rows, self.capacity, dtype=torch.float32)
        self.counts = torch.zeros(rows, dtype=torch.int32)
        self.thresholds = torch.full((rows,), torch.nan, dtype=torch.float32)

    def share_crowded(self) -> float:
        """Return the share of rows that had too many candidates."""
        return float((self.counts < 0).float().mean())

    def update(
        self,
        scores: torch.Tensor,
        first: int,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        factors: tuple[torch.Tensor, torch.Tensor],
        weight: Rounded,
        last: bool,
    ) -> None:
        """Take the scores of the next latents.

        Args:
            scores: [rows, width] bfloat16 or float32, without bias and scale.
            first: latent of the first column.
            bias: [width] float32, or None.
            scale: [width] float32, or None.
            factors: see `factors_of_bounds`.
            weight: the rows of these latents.
            last: there are no others.
        """
        launch(
            "screen_scores",
            scores,
            scores=matrix(scores),
            first=first,
            k=self.k,
            bias=pointer(bias),
            scale=pointer(scale),
            x_errors=factors[0].data_ptr(),
            x_lengths=factors[1].data_ptr(),
            lengths=weight.lengths.data_ptr(),
            errors=weight.errors.data_ptr(),
            score_error=SLACK * (SCORE_ERRORS[scores.dtype] + OWN_ERROR),
            bias_error=OWN_ERROR,
            least_error=(4 * weight.rows.shape[1] + 16) * SMALLEST,
            last=last,
            capacity=self.capacity,
            latents=self.latents.data_ptr(),
            lower=self.lower.data_ptr(),
            upper=self.upper.data_ptr(),
            counts=self.counts.data_ptr(),
            thresholds=self.thresholds.data_ptr(),
        )


def find_candidates(product: Product, k: int, latents: range) -> Candidates:
    """Return the latents of a range that may be among the k largest of each row."""
    count, depth = product.rows.shape
    candidates = Candidates(count, k)
    rounded_depth = depth if product.kept is None else 1
    width = max(LEAST_WIDTH, SLICE_ELEMENTS // max(count, rounded_depth))
    width = min(width, len(latents))
    scores = torch.empty(count * width, dtype=product.dtype)
    buffer = torch.empty(width * rounded_depth, dtype=torch.bfloat16)
    layer = product.layer
    for first in range(latents.start, latents.stop, width):
        last = min(first + width, latents.stop)
        out = scores[: count * (last - first)].view(count, last - first)
        weight = product.write(range(first, last), out, buffer)
        bias, scale = (
            None if vector is None else vector[first:last].contiguous()
            for vector in (layer.bias, layer.scale)
        )
        candidates.update(
            out, first, bias, scale, product.factors, weight, last == latents.stop
        )  # fmt: skip
        if first == latents.start and candidates.share_crowded() > MOST_CROWDED:
            candidates.counts.fill_(-1)  # the other slices would be in vain
            break
    return candidates


def _select(
    product: Product,
    selection: Selection,
    latents: range,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of a range of latents."""
    layer, rows = product.layer, product.rows
    candidates = find_candidates(product, selection.k, latents)
    crowded = (candidates.counts < 0).nonzero().squeeze(1)
    if len(crowded) < len(rows):
        used = int(candidates.counts.max())
        listed = torch.arange(used) < candidates.counts.unsqueeze(1)
        chosen = candidates.latents[:, :used].masked_fill(~listed, 0)
        _select_listed(layer, rows, selection, chosen, listed, values, indices)
    if len(crowded) == 0:
        return
    codes = values[crowded], indices[crowded]
    if product.dtype == torch.bfloat16:
        exact = Product(layer, rows[crowded], torch.float32)
        _select(exact, selection, latents, *codes)
    else:
        _select_among_all(layer, rows[crowded], selection, latents, *codes)
    values[crowded], indices[crowded] = codes


def _select_listed(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: torch.Tensor,
    listed: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes among some latents [count, used] of each row, those that are `listed`.

    In a row they ascend, the listed ones first. A row without any is left alone.
    """
    places = listed.view(-1).nonzero().squeeze(1).to(torch.int32)
    offsets, order = transpose_codes(latents[listed], len(layer.weight), "linear_topk")
    scores = dots_of_listed(rows, layer.weight, latents, offsets, places[order])
    if layer.bias is not None:
        scores.add_(layer.bias[latents])
    if layer.scale is not None:
        scores.mul_(layer.scale[latents])
    scores.masked_fill_(~listed, -torch.inf)
    top_values, columns, _ = topk_native.topk(
        scores, selection.k, selection.sorted, selection.relu, False, False
    )
    top_indices = latents.gather(1, columns).long()
    if bool(listed[:, 0].all()):
        values.copy_(top_values)
        indices.copy_(top_indices)
    else:
        written = listed[:, 0]
        values[written], indices[written] = top_values[written], top_indices[written]


def _select_among_all(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: range,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of rows whose scores of all latents of a range are computed one by one."""
    every = torch.arange(latents.start, latents.stop, dtype=torch.int32)
    step = max(1, EXHAUSTIVE_ELEMENTS // len(every))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = every.repeat(len(rows[part]), 1)
        listed = torch.ones_like(chosen, dtype=torch.bool)
        _select_listed(layer, rows[part], selection, chosen, listed, values[part], indices[part])
