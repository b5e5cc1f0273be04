"""The k largest of each row, as codes or as a masked dense row (see docs/how-topk-works.md).

`select_kernel` finds the columns of the k largest: one program owns one row of up to REGISTER_ROW
elements (several rows, when they are short), reads it once, coalesced where its columns are, and
keeps it in registers as ordered integer keys. It bisects on the key for the k-th largest (each
step counts in registers: 4 instructions a key, and a sum over the program), takes equal keys by
lowest index with one prefix sum, and writes the k columns in ascending order. It is bound by
instructions: about 50 a key, and 4 for each of 10 to 32 steps.

So long rows are made short first. `triton_groups` reads them once and leaves the best element of
each group of S neighbours; the k best groups of a row are selected, and then the k largest of their
k * S elements. With S near sqrt(n / k) the selections see 2 sqrt(n k) keys of a row instead of n.

A few long rows are cut into slices instead, whose k largest are the candidates of a further level:
as many programs as there are slices, and fewer launches. Where k is so large that a level need not
halve the row, `triton_passes` reads the row several times. `triton_finish` turns columns into
codes: in a launch of its own, since threads cannot hand each other data in global memory inside one
on every architecture.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two
from ..triton_keys import bits_of, key_of
from .triton_finish import finish_codes
from .triton_groups import group_maxima
from .triton_passes import columns_by_passes

# Longest row one program keeps in registers, with 16 warps of 60 to 75 registers a thread: at most
# 64 (it depends on the compiler) let a second program load on a multiprocessor while one searches.
# More than 32767 would overflow the two 16-bit counters that share one prefix sum.
REGISTER_ROW = 8192
# Keys a warp holds: 16 a thread, since prefix sums and addresses take as much again each.
KEYS_PER_WARP = 512
# Elements that short rows are gathered up to, for one warp, and the most rows of such a program:
# each costs addresses and counters.
SHORT_ROWS = 512
MOST_ROWS = 16
# Programs that fill a large GPU twice; fewer rows than this are cut into slices of at least
# MIN_SLICE elements.
MANY_PROGRAMS = 264
MIN_SLICE = 4096
# Groups have a power of two of elements up to MOST_SPAN, and the k best ones up to GROUPED_ROW: one
# program of 8 warps. From MANY_ELEMENTS on, two more launches cost less than they save.
LEAST_SPAN = 4
MOST_SPAN = 128
GROUPED_ROW = 4096
MANY_ELEMENTS = 1 << 21
# Slices begin at multiples of this: Triton then knows that wide loads are aligned.
ALIGNMENT = 16
# Steps of the search between two tests whether it has ended; further steps change nothing.
STEPS_PER_TEST = tl.constexpr(2)


@triton.jit
def narrowed(key, k, low, high, trial):
    """Return low and high after counting the keys of each row of key [ROWS, N] that reach trial.

    A count of exactly k ends the search of its row: trial itself will do.
    """
    count = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
    high = tl.where(count > k, high, tl.where(count == k, trial + 1, trial))
    return tl.where(count >= k, trial, low), high


@triton.jit
def kth_key(key, k, INFINITY: tl.constexpr, ROWS: tl.constexpr):
    """Bisect each row of key [ROWS, N] for a t with #{key > t} < k <= #{key >= t}.

    Invariant: #{key >= low} >= k > #{key >= high}. Mostly the k-th is not 16 times smaller than the
    largest, so that is tried first: of the 32 bits of a key it saves the search about 7.
    """
    low = tl.full([ROWS], -INFINITY, tl.int32)
    high = tl.max(key, axis=1) + 1
    # The lowest bit of +inf is one octave. Far below zero there is nothing to save.
    trial = tl.where(high > -(INFINITY >> 1), high - 4 * (INFINITY & -INFINITY), low)
    low, high = narrowed(key, k, low, high, trial)
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        for _ in tl.static_range(STEPS_PER_TEST):
            # Their mean, rounded down, without overflow.
            middle = (low & high) + ((low ^ high) >> 1)
            low, high = narrowed(key, k, low, high, middle)
    return low


@triton.jit
def select_kernel(
    x,  # [rows, width] bits, any strides
    candidates,  # [rows, n / SPAN] int32 when SPAN: the groups of x to select from, ascending
    taken,  # [rows, slices, k] int32
    rows,
    width,
    n,
    k,
    slices,
    length,
    row_stride,
    col_stride,
    list_stride,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    SMALLEST: tl.constexpr,
    SPAN: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to taken[r, s] the columns of the k largest of a slice s of row r, ascending.

    A row has n elements: all of x[r], with SPAN = 0, or those of the groups of SPAN columns that
    are its candidates. The slice is the elements s * length .. (s + 1) * length.

    With the bound t, the k-th largest key, these are the elements with key > t and, of those with
    key = t, the first k - #{key > t}.
    """
    part = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    row = part // slices
    begin = part % slices * length
    k_here = tl.minimum(k, n - begin).to(tl.int32)  # the last slice may be shorter than k
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < length)[None, :]  # [ROWS, BLOCK]
    inside = inside & (begin[:, None] + columns[None, :] < n)
    if SPAN > 0:
        listed = candidates + (row * list_stride + begin // SPAN)[:, None]
        listed = listed + (columns // SPAN)[None, :]
        latents = tl.load(listed, mask=inside, other=0) * SPAN + (columns % SPAN)[None, :]
        inside = inside & (latents < width)  # the last group may be cut off
        if UNIT_STRIDE:
            elements = x + (row * row_stride)[:, None] + latents
        else:
            elements = x + (row * row_stride)[:, None] + latents.to(tl.int64) * col_stride
    elif UNIT_STRIDE:
        elements = x + (row * row_stride + begin)[:, None] + columns[None, :]
    else:
        elements = x + (row * row_stride + begin * col_stride)[:, None]
        elements = elements + (columns.to(tl.int64) * col_stride)[None, :]

    bits = tl.load(elements, mask=inside, other=0).to(tl.int32)
    key = tl.where(inside, key_of(bits, MAGNITUDE, INFINITY, ABS, SMALLEST), -INFINITY - 1)

    bound = kth_key(key, k_here, INFINITY, ROWS)[:, None]
    wanted = (k_here - tl.sum((key > bound).to(tl.int32), axis=1))[:, None]
    ranks = (key > bound).to(tl.int32) + ((key == bound).to(tl.int32) << 16)
    ranks = tl.cumsum(ranks, axis=1)  # two counters, each with the element itself
    take = (key > bound) | ((key == bound) & ((ranks >> 16) <= wanted))
    place = (ranks & 0xFFFF) + tl.minimum(ranks >> 16, wanted) - 1
    place = tl.where(take, place, -1)  # one number to carry to the threads that store, not two

    if SPAN == 0:
        latents = begin.to(tl.int32)[:, None] + columns[None, :]
    elif SPAN == 1:  # the longest lists: read again, from the cache, rather than held all along
        latents = tl.load(listed, mask=place >= 0, other=0)
    tl.store(taken + (part * k)[:, None] + place, latents, mask=place >= 0)


def row_block(n: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of one program for rows of n <= REGISTER_ROW elements."""
    columns = max(16, next_power_of_two(n))
    rows = max(1, min(MOST_ROWS, SHORT_ROWS // columns))
    return rows, columns, max(1, columns // KEYS_PER_WARP)


def slice_length(rows: int, n: int, k: int) -> int:
    """Return the length of the slices of a row; n if one program takes it whole."""
    even = cdiv(n, max(1, MANY_PROGRAMS // rows))
    length = min(REGISTER_ROW, max(even, MIN_SLICE, 4 * k))
    return cdiv(length, ALIGNMENT) * ALIGNMENT if length < n else n


def group_span(rows: int, n: int, k: int) -> int:
    """Return how many neighbours make a group, a power of two; 0 where groups do not pay.

    The two selections see n / span and k * span keys of a row, fewest at span = sqrt(n / k).
    """
    if rows * n < MANY_ELEMENTS or n < MIN_SLICE:
        return 0
    span = min(MOST_SPAN, math.isqrt(n // k), GROUPED_ROW // k)
    return 1 << (span.bit_length() - 1) if span >= LEAST_SPAN else 0


def topk(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [rows, k], indices int64 [rows, k], counts int64 [n], or [0] without count.

    x is [rows, n] of any strides.
    """
    with device_of(x):
        columns = _select_columns(x, k, abs, smallest)
        return finish_codes(x, columns, sorted, relu, abs, count, smallest, None)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return masked [rows, n], and its codes and counts as `topk` does, by ascending index."""
    masked = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    with device_of(x):
        columns = _select_columns(x, k, abs, False)
        return masked, *finish_codes(x, columns, False, relu, abs, count, False, masked)


def _select_columns(x: torch.Tensor, k: int, abs: bool, smallest: bool) -> torch.Tensor:
    """Return columns int32 [rows, k] of the k largest of each row of x, ascending."""
    rows, n = x.shape
    if span := group_span(rows, n, k):
        groups = _select_columns(group_maxima(x, span, abs, smallest), k, abs, smallest)
        return _launch_select(x, groups, span, k * span, k, k * span, abs, smallest)
    if n > REGISTER_ROW and 2 * k > REGISTER_ROW:
        return columns_by_passes(x, k, abs, smallest)
    candidates = None
    while (length := slice_length(rows, n, k)) < n:
        slices = cdiv(n, length)
        candidates = _launch_select(x, candidates, 1, n, k, length, abs, smallest)
        n = (slices - 1) * k + min(k, n - (slices - 1) * length)
        candidates = candidates[:, :n]  # only a last slice shorter than k leaves a rest
    return _launch_select(x, candidates, 1, n, k, n, abs, smallest)


def _launch_select(
    x: torch.Tensor,
    candidates: torch.Tensor | None,
    span: int,
    n: int,
    k: int,
    length: int,
    abs: bool,
    smallest: bool,
) -> torch.Tensor:
    """Return columns [rows, slices * k] of the k largest of each slice: one level.

    The n elements of a row are those of its candidates, groups of span columns, if there are any.
    """
    rows, width = x.shape
    slices = cdiv(n, length)
    bits = bits_of(x.dtype)
    taken = torch.empty(rows, slices * k, dtype=torch.int32, device=x.device)
    block_rows, columns, warps = row_block(length)
    select_kernel[(cdiv(rows * slices, block_rows),)](
        x.view(bits.integer),
        taken if candidates is None else candidates,
        taken,
        rows,
        width,
        n,
        k,
        slices,
        length,
        *x.stride(),
        0 if candidates is None else candidates.stride(0),
        MAGNITUDE=bits.magnitude,
        INFINITY=bits.infinity,
        ABS=abs,
        SMALLEST=smallest,
        SPAN=0 if candidates is None else span,
        UNIT_STRIDE=x.stride(1) == 1,
        ROWS=block_rows,
        BLOCK=columns,
        num_warps=warps,
    )
    return taken
