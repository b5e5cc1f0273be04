"""The k largest of each row, as codes or as a masked dense row.

`select_kernel` is the whole selection: one program owns one row of up to REGISTER_ROW elements (several rows, when they
are short), reads it once, coalesced where its columns are, and keeps it in registers as ordered integer keys. It
bisects on the key for the k-th largest (each step counts in registers), takes equal keys by lowest index with one
prefix sum, and writes its k codes in index order. Bound by the one read as long as its 16 to 32 counts stay below it.

Longer rows are cut into slices, whose k largest in index order are the candidates of a further level: still one read of
the data, and as many programs as there are slices. Where k is so large that a level need not halve the row,
`topk_stream` reads the row several times instead. `order_kernel` puts codes in order of value by counting, for each,
how many come before it: k * k comparisons a row, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device_of
from .keys import bits_of, fires, ordered_key, rectified
from .topk_stream import stream_codes

# Longest row one program keeps in registers: 64 keys a thread with 8 warps. It also keeps the two 16-bit counters that
# share one prefix sum from overflowing.
REGISTER_ROW = 16384
# Keys a warp holds: 64 a thread, so that keys, prefix sums and addresses fit into 255 registers.
KEYS_PER_WARP = 2048
# Elements that short rows are gathered up to: 32 a thread of one warp.
SHORT_ROWS = 1024
# Programs that fill a large GPU twice; fewer rows than this are cut into slices of at least MIN_SLICE elements.
MANY_PROGRAMS = 264
MIN_SLICE = 4096
# Comparisons in one tile of the ordering (32 a thread of 4 warps) and the longest side of a tile.
ORDER_TILE = 4096
ORDER_SIDE = 64
# Codes one program of the dense scatter owns: 8 a thread.
SCATTER_BLOCK = 1024


# -- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def kth_key(key, k, INFINITY: tl.constexpr, ROWS: tl.constexpr):
    """For each row of key [ROWS, N], a t with #{key > t} < k <= #{key >= t}, by bisection.

    Invariant: #{key >= low} >= k > #{key >= high}. A step that counts exactly k ends the search of its row.
    """
    low = tl.full([ROWS], -INFINITY, tl.int32)
    high = tl.full([ROWS], INFINITY + 2, tl.int32)
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        count = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
        low = tl.where(count >= k, middle, low)
    return low


@triton.jit
def select_kernel(
    x,  # [rows, n] bits, any strides
    origin,  # [rows, n] int32: index of each element in the caller's row, when HAS_ORIGIN
    values,  # [rows, slices, k] bits
    indices,  # [rows, slices, k]
    masked,  # [rows, n] bits, when MASKED
    counts,  # [n] int64, when COUNT
    rows,
    n,
    k,
    slices,
    row_stride,
    col_stride,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    RELU: tl.constexpr,
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_ORIGIN: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values, indices = the k largest of x[row, s * n / slices : (s + 1) * n / slices], by ascending index.

    Taken are the elements with key > t, and of those with key = t the first k - #{key > t}.
    """
    part = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    row = part // slices
    begin = (part % slices) * n // slices
    length = ((part % slices + 1) * n // slices - begin).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns[None, :] < length[:, None])  # [ROWS, BLOCK]
    if UNIT_STRIDE:
        elements = x + (row * row_stride + begin)[:, None] + columns[None, :]
    else:
        elements = x + (row * row_stride + begin * col_stride)[:, None]
        elements = elements + (columns.to(tl.int64) * col_stride)[None, :]

    bits = tl.load(elements, mask=inside, other=0).to(tl.int32)
    key = ordered_key(bits, MAGNITUDE, INFINITY, ABS)
    key = tl.where(inside, key, -INFINITY - 1)

    threshold = kth_key(key, k, INFINITY, ROWS)[:, None]
    above = (key > threshold).to(tl.int32)
    tied = (key == threshold).to(tl.int32)
    wanted = k - tl.sum(above, axis=1)[:, None]
    before = tl.cumsum(above + (tied << 16), axis=1)  # two counters, themselves included
    tied_before = before >> 16
    take = inside & ((above > 0) | ((tied > 0) & (tied_before <= wanted)))
    place = (before & 0xFFFF) + tl.minimum(tied_before, wanted) - 1

    # Read again, from the cache, only what is taken: cheaper than to hold the bits all along.
    bits = tl.load(elements, mask=take, other=0).to(tl.int32)
    if RELU:
        bits = rectified(bits, MAGNITUDE, INFINITY)
    if HAS_ORIGIN:
        latents = tl.load(
            origin + (row * n + begin)[:, None] + columns[None, :], mask=take, other=0
        )
    else:
        latents = begin.to(tl.int32)[:, None] + columns[None, :]
    codes = (part * k)[:, None] + place
    tl.store(values + codes, bits, mask=take)
    tl.store(indices + codes, latents, mask=take)
    if MASKED:
        tl.store(masked + (row * n)[:, None] + columns[None, :], bits, mask=inside)
    if COUNT:
        ones = tl.full([ROWS, BLOCK], 1, tl.int64)
        fired = take & fires(bits, MAGNITUDE)
        tl.atomic_add(counts + latents, ones, mask=fired, sem="relaxed")


@triton.jit
def order_kernel(
    codes_values,  # [rows, k] bits, by ascending index
    codes_indices,  # [rows, k]
    values,  # [rows, k] bits
    indices,  # [rows, k]
    counts,  # [n] int64, when COUNT
    rows,
    k,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    RELU: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """values[r, rank(i)] = codes_values[r, i] with rank(i) = #{j : key_j > key_i, or key_j = key_i and j < i}.

    One program owns SIDE codes of ROWS rows and walks over all k codes of those rows, SIDE at a time.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    first = row * k
    own = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (own < k)[None, :]  # [ROWS, SIDE]
    bits = tl.load(codes_values + first[:, None] + own[None, :], mask=inside, other=0).to(tl.int32)
    latents = tl.load(codes_indices + first[:, None] + own[None, :], mask=inside, other=0)
    key = ordered_key(bits, MAGNITUDE, INFINITY, ABS)[:, :, None]

    rank = tl.zeros([ROWS, SIDE], tl.int32)
    begin = 0
    while begin < k:
        other = begin + tl.arange(0, SIDE)
        there = (row < rows)[:, None] & (other < k)[None, :]
        address = codes_values + first[:, None] + other[None, :]
        other_key = ordered_key(
            tl.load(address, mask=there, other=0).to(tl.int32), MAGNITUDE, INFINITY, ABS
        )
        other_key = tl.where(there, other_key, -INFINITY - 1)[:, None, :]
        earlier = (other[None, :] < own[:, None])[None, :, :]
        precedes = (other_key > key) | ((other_key == key) & earlier)
        rank += tl.sum(precedes.to(tl.int32), axis=2)
        begin += SIDE

    if RELU:
        bits = rectified(bits, MAGNITUDE, INFINITY)
    tl.store(values + first[:, None] + rank, bits, mask=inside)
    tl.store(indices + first[:, None] + rank, latents, mask=inside)
    if COUNT:
        ones = tl.full([ROWS, SIDE], 1, tl.int64)
        tl.atomic_add(counts + latents, ones, mask=inside & fires(bits, MAGNITUDE), sem="relaxed")


@triton.jit
def scatter_kernel(values, indices, dense, total, k, n, BLOCK: tl.constexpr):
    """dense[b, indices[b, j]] = values[b, j]: one program owns BLOCK consecutive codes."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < total
    latents = tl.load(indices + entries, mask=inside, other=-1).to(tl.int64)
    bits = tl.load(values + entries, mask=inside, other=0)
    valid = (latents >= 0) & (latents < n)
    tl.store(dense + entries // k * n + latents, bits, mask=valid)


# -- shapes of blocks ------------------------------------------------------------------------------------------


def row_block(n: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one program for rows of n elements, at most REGISTER_ROW."""
    columns = max(16, triton.next_power_of_2(n))
    return max(1, SHORT_ROWS // columns), columns, max(1, columns // KEYS_PER_WARP)


def slice_count(rows: int, n: int, k: int) -> int:
    """Into how many slices, each of at least k and at most REGISTER_ROW elements, a row is cut."""
    needed = triton.cdiv(n, REGISTER_ROW)
    sensible = min(MANY_PROGRAMS // rows, n // max(MIN_SLICE, 4 * k))
    return max(1, needed, sensible)


def order_block(k: int) -> tuple[int, int]:
    """(rows, side) of one program of the ordering."""
    side = min(ORDER_SIDE, max(16, triton.next_power_of_2(k)))
    return (ORDER_TILE // (side * side) if k <= side else 1), side


# -- launchers -------------------------------------------------------------------------------------------------


def topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values [rows, k], indices int64 [rows, k], counts int64 [n] or [0]) of x [rows, n] with any strides."""
    counts = _counts(x, count)
    with device_of(x):
        if not sorted:
            values, indices = _select(x, k, relu, abs, counts, torch.int64)
        else:
            codes = _select(x, k, False, abs, None, torch.int32)
            values, indices = _order(*codes, relu, abs, counts)
    return values, indices, _or_empty(counts, x)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(masked [rows, n], values [rows, k], indices int64 [rows, k], counts), by ascending index."""
    rows, n = x.shape
    counts = _counts(x, count)
    with device_of(x):
        if slice_count(rows, n, k) > 1:
            values, indices = _select(x, k, relu, abs, counts, torch.int64)
            masked = codes_to_dense(values, indices, n)
        else:
            masked = torch.empty(rows, n, dtype=x.dtype, device=x.device)
            values, indices = _select(x, k, relu, abs, counts, torch.int64, masked)
    return masked, values, indices, _or_empty(counts, x)


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Dense [rows, n] of contiguous values and indices [rows, k]; indices outside 0..n-1 are left out."""
    rows, k = values.shape
    dense = torch.zeros(rows, n, dtype=values.dtype, device=values.device)
    integer = bits_of(values.dtype).integer
    total = values.numel()
    if total:
        with device_of(values):
            scatter_kernel[(triton.cdiv(total, SCATTER_BLOCK),)](
                values.view(integer),
                indices,
                dense.view(integer),
                total,
                k,
                n,
                BLOCK=SCATTER_BLOCK,
                num_warps=4,
            )
    return dense


def _select(
    x: torch.Tensor,
    k: int,
    relu: bool,
    abs: bool,
    counts: torch.Tensor | None,
    index_dtype: torch.dtype,
    masked: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, k] of x by ascending index, after as many levels of slices as its length asks for."""
    rows, n = x.shape
    if n > REGISTER_ROW and 2 * k > REGISTER_ROW:
        return stream_codes(x, k, relu, abs, counts, index_dtype)
    origin = None
    while (slices := slice_count(rows, x.shape[1], k)) > 1:
        x, origin = _launch_select(x, origin, k, slices, False, abs, None, torch.int32, None)
    return _launch_select(x, origin, k, 1, relu, abs, counts, index_dtype, masked)


def _launch_select(
    x: torch.Tensor,
    origin: torch.Tensor | None,
    k: int,
    slices: int,
    relu: bool,
    abs: bool,
    counts: torch.Tensor | None,
    index_dtype: torch.dtype,
    masked: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One level: the k largest of each slice, [rows, slices * k]."""
    rows, n = x.shape
    bits = bits_of(x.dtype)
    values = torch.empty(rows, slices * k, dtype=x.dtype, device=x.device)
    indices = torch.empty(rows, slices * k, dtype=index_dtype, device=x.device)
    block_rows, columns, warps = row_block(triton.cdiv(n, slices))
    select_kernel[(triton.cdiv(rows * slices, block_rows),)](
        x.view(bits.integer),
        indices if origin is None else origin,
        values.view(bits.integer),
        indices,
        values.view(bits.integer) if masked is None else masked.view(bits.integer),
        indices if counts is None else counts,
        rows,
        n,
        k,
        slices,
        *x.stride(),
        MAGNITUDE=bits.magnitude,
        INFINITY=bits.infinity,
        ABS=abs,
        RELU=relu,
        COUNT=counts is not None,
        MASKED=masked is not None,
        HAS_ORIGIN=origin is not None,
        UNIT_STRIDE=x.stride(1) == 1,
        ROWS=block_rows,
        BLOCK=columns,
        num_warps=warps,
    )
    return values, indices


def _order(
    codes_values: torch.Tensor,
    codes_indices: torch.Tensor,
    relu: bool,
    abs: bool,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, k] by ascending index put in order of value, largest first."""
    rows, k = codes_values.shape
    bits = bits_of(codes_values.dtype)
    values = torch.empty_like(codes_values)
    indices = torch.empty(rows, k, dtype=torch.int64, device=values.device)
    block_rows, side = order_block(k)
    order_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(k, side))](
        codes_values.view(bits.integer),
        codes_indices,
        values.view(bits.integer),
        indices,
        indices if counts is None else counts,
        rows,
        k,
        MAGNITUDE=bits.magnitude,
        INFINITY=bits.infinity,
        ABS=abs,
        RELU=relu,
        COUNT=counts is not None,
        ROWS=block_rows,
        SIDE=side,
        num_warps=4,
    )
    return values, indices


def _counts(x: torch.Tensor, count: bool) -> torch.Tensor | None:
    return torch.zeros(x.shape[1], dtype=torch.int64, device=x.device) if count else None


def _or_empty(counts: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device) if counts is None else counts
