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
from types import ModuleType
from typing import Any

import torch

from ...dispatch.backends import new_choices
from ...dispatch.modules import native_module
from .candidates import CANDIDATES_PER_CODE, Candidates, error_bound, factors_of_bounds
from .kept import kept_copy
from .rounded import Rounded, room_for
from .slices import Layer, Selection, buffer_elements

# Elements of the scores of a slice on a CPU, and of the rounded weights it is made from: both fit
# its last cache, and what a slice costs beside them counts little.
SLICE_ELEMENTS = 8 << 20
LEAST_WIDTH = 1024
MOST_LATENTS = 2**31
# Share of rows with too many candidates after the first slice, from which on all rows are done in
# full precision.
MOST_CROWDED = 0.25
# Scores held at a time where all scores of some rows are computed.
EXHAUSTIVE_ELEMENTS = 4 << 20

# What both ways take, in nanoseconds of two threads of an EPYC of 2023; only ratios matter.
NANOSECONDS = {
    "weight": 0.27,  # an element that is read from memory, and rounded
    "cached weight": 0.06,  # the same of a weight that fits the caches
    "float32": 0.0115,  # a term of a product
    "kernel": 0.009,  # the same in the kernel of few rows
    "bfloat16": 0.005,
    "score": 0.7,
    "candidate": 26,
    "term": 0.073,  # of a candidate's product
    "call": 350e3,  # beyond what one in float32 takes
}
CACHED_ELEMENTS = 4 << 20
KEPT_READING = 0.55  # reading a rounded copy, of the time of reading and rounding the weight
KERNEL_READING = 0.5  # reading the weight in the kernel of few rows
CANDIDATES_EXPECTED = 2.5  # as multiples of k


def select_rows(
    kernels: ModuleType,
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    values: torch.Tensor,
    indices: torch.Tensor,
    few: bool = False,
) -> bool:
    """Write the codes of some rows [count, d] to values and indices [count, k].

    Args:
        kernels: native.py or triton.py.
        layer: a linear layer.
        rows: [count, d].
        selection: what to select.
        values: [count, k] of the rows' dtype.
        indices: [count, k] int64.
        few: the kernel of few rows could serve instead.

    Returns:
        False, with nothing written, where screening cannot serve or does not pay.
    """
    groups, k = selection.groups, selection.k // selection.groups
    width = layer.width // groups
    if not _serves(kernels, layer, rows, k, width):
        return False
    kept = kept_copy(layer.weight) if rows.is_cpu else None
    if not (rows.is_cuda or pays(len(rows), rows.shape[1], width, k, kept is not None, few)):
        return False
    product = Product(kernels, layer, rows, torch.bfloat16, kept)
    for group in range(groups):
        latents = range(group * width, (group + 1) * width)
        codes = slice(group * k, (group + 1) * k)
        _select(product, selection._replace(k=k), latents, values[:, codes], indices[:, codes])
    return True


def _serves(kernels: ModuleType, layer: Layer, rows: torch.Tensor, k: int, width: int) -> bool:
    return (
        rows.dtype == torch.float32 == layer.weight.dtype
        and layer.latents is None
        and 1 in layer.weight.stride()
        and CANDIDATES_PER_CODE * k <= width < MOST_LATENTS
        and _is_wanted(kernels, rows.device)
    )


def _is_wanted(kernels: ModuleType, device: torch.device) -> bool:
    """Return whether products on a device are screened: unless asked, where that is measured."""
    if device.type == "cuda":
        return _asked_for(False) and not torch.cuda.is_current_stream_capturing()
    if getattr(kernels, "ONLY_IF_ASKED", False):  # Triton's interpreter
        return _asked_for(False) and device.type == "cpu"
    return _asked_for(True) and device.type == "cpu" and is_quick_here()


def _asked_for(default: bool) -> bool:
    if _asked:
        return _asked[-1]
    said = os.environ.get("SPARSEKERN_SCREENING")
    return default if said is None else said != "0"


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

    By default it does on a CPU where that is measured to pay, and not on a GPU, where it has not
    been measured; the environment variable SPARSEKERN_SCREENING, 0 or 1, changes that. With and
    without it, the k largest scores are selected; the last bits of the values, and the order of
    scores that differ by no more, are those of another order of additions. On a GPU the host waits
    to learn which rows have too many candidates, so the capture of a graph goes without screening.
    The choice holds for the whole process.

    Raises:
        TypeError: enabled is no bool.

    Example:
        >>> import torch, sparsekern
        >>> with sparsekern.screening(False):
        ...     codes = sparsekern.linear_topk(torch.randn(9, 64), torch.randn(99, 64), None, 8)
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"screening: enabled must be a bool, got {enabled!r}")
    return _asking_for(enabled)


@contextlib.contextmanager
def _asking_for(enabled: bool) -> Iterator[None]:
    _asked.append(enabled)
    try:
        yield
    finally:
        _asked.pop()


def pays(rows: int, depth: int, width: int, k: int, kept: bool, few: bool) -> bool:
    """Return True if screening takes less time than a product in float32, by a model of both.

    kept: the weight is rounded already. few: the kernel of few rows makes the product.
    """
    weights = width * depth
    cached = weights <= CACHED_ELEMENTS
    reading = NANOSECONDS["cached weight" if cached else "weight"] * weights
    if few:
        exact = KERNEL_READING * reading + NANOSECONDS["kernel"] * rows * weights
        exact += NANOSECONDS["score"] * rows * width
    else:
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
        kernels: native.py or triton.py.
        layer: its weight is float32.
        rows: [count, d] float32.
        dtype: bfloat16, in which both are rounded first, or float32.
        kept: the rounded weight, if it is at hand.

    Attributes:
        factors: [count] float32 each: of the lengths and of the errors of a latent in the bound of
            its error.
    """

    def __init__(
        self,
        kernels: ModuleType,
        layer: Layer,
        rows: torch.Tensor,
        dtype: torch.dtype,
        kept: Rounded | None = None,
    ) -> None:
        self.kernels: Any = kernels
        self.layer, self.rows, self.dtype, self.kept = layer, rows, dtype, kept
        # A GPU's product of bfloat16 rows can be had in float32, a CPU's cannot.
        self.score_dtype = torch.float32 if rows.is_cuda else dtype
        self._left = self._operand(rows, self.kernels.round_rows(rows, room_for(rows)))
        self.factors = factors_of_bounds(self._left, rows.shape[1])

    def _operand(self, rows: torch.Tensor, rounded: Rounded) -> Rounded:
        if self.dtype == torch.bfloat16:
            return rounded
        return Rounded(rows, rounded.lengths, torch.zeros_like(rounded.errors))

    def write(self, latents: range, out: torch.Tensor, buffer: torch.Tensor) -> Rounded:
        """Write the scores of some latents; return their rows of the weight as they were used.

        out: [count, latents] of score_dtype. buffer: for their rounded rows.
        """
        weight = self.layer.weight[latents.start : latents.stop]
        if self.kept is None:
            rounded = self.kernels.round_rows(weight, room_for(weight, buffer))
        else:
            rounded = self.kept.part(latents.start, latents.stop)
        right = self._operand(weight, rounded)
        if self.dtype == self.score_dtype:
            torch.mm(self._left.rows, right.rows.t(), out=out)
        else:
            torch.mm(self._left.rows, right.rows.t(), self.score_dtype, out=out)
        return right


def find_candidates(product: Product, k: int, latents: range) -> Candidates:
    """Return the latents of a range that may be among the k largest of each row."""
    rows, layer = product.rows, product.layer
    count, depth = rows.shape
    candidates = Candidates(count, k, rows.device)
    rounded_depth = depth if product.kept is None else 1
    elements = SLICE_ELEMENTS if rows.is_cpu else buffer_elements(rows.device)
    width = max(LEAST_WIDTH, elements // max(count, rounded_depth))
    width = min(width, len(latents))
    scores = rows.new_empty(count * width, dtype=product.score_dtype)
    buffer = rows.new_empty(width * rounded_depth, dtype=torch.bfloat16)
    for first in range(latents.start, latents.stop, width):
        last = min(first + width, latents.stop)
        out = scores[: count * (last - first)].view(count, last - first)
        weight = product.write(range(first, last), out, buffer)
        bias, scale = (
            None if vector is None else vector[first:last].contiguous()
            for vector in (layer.bias, layer.scale)
        )
        bound = error_bound(product.factors, weight, out.dtype)
        product.kernels.screen_scores(
            candidates, out, first, bias, scale, bound, last == latents.stop
        )
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
    kernels, layer, rows = product.kernels, product.layer, product.rows
    candidates = find_candidates(product, selection.k, latents)
    crowded = (candidates.counts < 0).nonzero().squeeze(1)
    if len(crowded) < len(rows):
        used = int(candidates.counts.max())
        chosen = candidates.latents[:, :used]
        found = _select_listed(kernels, layer, rows, selection, chosen, candidates.counts)
        if len(crowded) == 0:
            values.copy_(found[0])
            indices.copy_(found[1])
        else:
            listed = candidates.counts > 0
            values[listed], indices[listed] = found[0][listed], found[1][listed]
    if len(crowded) == 0:
        return
    codes = values[crowded], indices[crowded]
    if product.dtype == torch.bfloat16 and is_float32_exact(rows.device):
        exact = Product(kernels, layer, rows[crowded], torch.float32)
        _select(exact, selection, latents, *codes)
    else:
        _select_among_all(kernels, layer, rows[crowded], selection, latents, *codes)
    values[crowded], indices[crowded] = codes


def is_float32_exact(device: torch.device) -> bool:
    """Return False if torch may round what a float32 product multiplies, as its user asked."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def _select_listed(
    kernels: Any,
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes among the first counts[b] latents [count, used] of each row, ascending.

    Those of a row without any mean nothing.
    """
    scores = kernels.score_candidates(layer, rows, latents, counts)
    values, columns, _ = selection.select(
        scores, selection.k, selection.sorted, selection.relu, False, False
    )
    return values, latents.gather(1, columns).long()


def _select_among_all(
    kernels: Any,
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    latents: range,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write the codes of rows whose scores of all latents of a range are computed one by one."""
    every = torch.arange(latents.start, latents.stop, dtype=torch.int32, device=rows.device)
    step = max(1, EXHAUSTIVE_ELEMENTS // len(every))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = every.repeat(len(rows[part]), 1)
        counts = chosen.new_full((len(chosen),), len(every))
        found = _select_listed(kernels, layer, rows[part], selection, chosen, counts)
        values[part], indices[part] = found
