"""The k largest of each row, as codes or as a masked dense row.

`select_kernel` is the whole selection: one program owns one row of up to REGISTER_ROW elements
(several rows, when they are short), reads it once, coalesced where its columns are, and keeps it
in registers as ordered integer keys. It bisects on the key for the k-th largest (each step counts
in registers), takes equal keys by lowest index with one prefix sum, and writes its k codes in
index order. Bound by the one read as long as its 16 to 32 counts stay below it.

Longer rows are cut into slices, whose k largest in index order are the candidates of a further
level: still one read of the data, and as many programs as there are slices. Where k is so large
that a level need not halve the row, `topk_stream` reads the row several times instead.
`order_kernel` puts codes in order of value by counting, for each, how many come before it: k * k
comparisons a row, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device_of
from .keys import bits_of, fires, ordered_key, rectified
from .topk_order import order_codes
from .topk_stream import stream_codes

# Longest row one program keeps in registers, with 16 warps. It also keeps the two 16-bit counters
# that share one prefix sum from overflowing.
REGISTER_ROW = 16384
# Slices this long are preferred where k allows: two such programs fit on a multiprocessor, so that
# one loads while the other searches.
SLICE = 8192
# Keys a warp holds: 32 a thread, which with their prefix sums fit into 128 registers.
KEYS_PER_WARP = 1024
# Codes a warp writes at once: 4 a thread.
CODES_PER_WARP = 128
# Elements that short rows are gathered up to, for one warp, and the most rows of such a program:
# each costs addresses and counters.
SHORT_ROWS = 1024
MOST_ROWS = 16
# Programs that fill a large GPU twice; fewer rows than this are cut into slices of at least
# MIN_SLICE elements.
MANY_PROGRAMS = 264
MIN_SLICE = 4096
# Slices begin at multiples of this: Triton then knows that wide loads are aligned.
ALIGNMENT = 16
# Steps of the search between two tests whether it has ended; further steps change nothing.
STEPS_PER_TEST = tl.constexpr(2)
# Codes one program of the dense scatter owns: 8 a thread.
SCATTER_BLOCK = 1024


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def kth_key(key, k, INFINITY: tl.constexpr, ROWS: tl.constexpr):
    """For each row of key [ROWS, N], a t with #{key > t} < k <= #{key >= t}, by bisection.

    Invariant: #{key >= low} >= k > #{key >= high}. A step that counts exactly k ends the search of
    its row.
    """
    low = tl.full([ROWS], -INFINITY, tl.int32)
    high = tl.full([ROWS], INFINITY + 2, tl.int32)
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        for _ in tl.static_range(STEPS_PER_TEST):
            # Their mean, rounded down, without overflow.
            middle = (low & high) + ((low ^ high) >> 1)
            count = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
            high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
            low = tl.where(count >= k, middle, low)
    return low


@triton.jit
def select_kernel(
    x,  # [rows, n] bits, any strides
    origin,  # [rows, n] int32, strides of x, when HAS_ORIGIN: indices in the caller's row
    values,  # [rows, slices, k] bits
    indices,  # [rows, slices, k]
    taken,  # [rows, slices, k] int32, working space: columns taken of each slice
    masked,  # [rows, n] bits, when MASKED
    counts,  # [n] int64, when COUNT
    rows,
    n,
    k,
    slices,
    length,
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
    CODES: tl.constexpr,
):
    """values, indices = the k largest of x[row, s * length : (s + 1) * length], by ascending index.

    Taken are the elements with key > t, and of those with key = t the first k - #{key > t}. Their
    columns go through memory, so that what follows costs k threads and not n, and the registers
    hold one row of keys only.
    """
    part = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    row = part // slices
    begin = part % slices * length
    k_here = tl.minimum(k, n - begin).to(tl.int32)  # the last slice may be shorter than k
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < length)[None, :]  # [ROWS, BLOCK]
    inside = inside & (begin[:, None] + columns[None, :] < n)
    if UNIT_STRIDE:
        elements = x + (row * row_stride + begin)[:, None] + columns[None, :]
    else:
        elements = x + (row * row_stride + begin * col_stride)[:, None]
        elements = elements + (columns.to(tl.int64) * col_stride)[None, :]

    key = tl.load(elements, mask=inside, other=0).to(tl.int32)
    key = tl.where(inside, ordered_key(key, MAGNITUDE, INFINITY, ABS), -INFINITY - 1)

    threshold = kth_key(key, k_here, INFINITY, ROWS)[:, None]
    wanted = (k_here - tl.sum((key > threshold).to(tl.int32), axis=1))[:, None]
    ranks = (key > threshold).to(tl.int32) + ((key == threshold).to(tl.int32) << 16)
    ranks = tl.cumsum(ranks, axis=1)  # two counters, each with the element itself
    take = (key > threshold) | ((key == threshold) & ((ranks >> 16) <= wanted))
    place = (ranks & 0xFFFF) + tl.minimum(ranks >> 16, wanted) - 1
    codes = (part * k)[:, None]
    tl.store(taken + codes + place, tl.broadcast_to(columns[None, :], [ROWS, BLOCK]), mask=take)
    if MASKED:
        dense = masked + (row * n)[:, None]
        tl.store(dense + columns[None, :], tl.zeros([ROWS, BLOCK], tl.int32), mask=inside)
    tl.debug_barrier()  # other threads read what was taken, and write where zeros were stored

    start = tl.full([], 0, tl.int32)
    while start < k:
        code = start + tl.arange(0, CODES)[None, :]
        there = (row < rows)[:, None] & (code < k_here[:, None])  # [ROWS, CODES]
        element = begin[:, None] + tl.load(taken + codes + code, mask=there, other=0)
        address = x + (row * row_stride)[:, None] + element * col_stride
        bits = tl.load(address, mask=there, other=0).to(tl.int32)
        latents = element
        if HAS_ORIGIN:
            address = origin + (row * row_stride)[:, None] + element
            latents = tl.load(address, mask=there, other=0).to(tl.int64)
        if RELU:
            bits = rectified(bits, MAGNITUDE, INFINITY)
        tl.store(values + codes + code, bits, mask=there)
        tl.store(indices + codes + code, latents, mask=there)
        if MASKED:
            tl.store(dense + latents, bits, mask=there)
        if COUNT:
            ones = tl.full([ROWS, CODES], 1, tl.int64)
            fired = there & fires(bits, MAGNITUDE)
            tl.atomic_add(counts + latents, ones, mask=fired, sem="relaxed")
        start += CODES


@triton.jit
def scatter_kernel(values, indices, dense, total, k, n, BLOCK: tl.constexpr):
    """dense[b, indices[b, j]] = values[b, j]: one program owns BLOCK consecutive codes."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < total
    latents = tl.load(indices + entries, mask=inside, other=-1).to(tl.int64)
    bits = tl.load(values + entries, mask=inside, other=0)
    valid = (latents >= 0) & (latents < n)
    tl.store(dense + entries // k * n + latents, bits, mask=valid)


# -- shapes of blocks ------------------------------------------------------------------------------


def row_block(n: int) -> tuple[int, int, int, int]:
    """(rows, columns, codes, warps) of one program for rows of n elements, at most REGISTER_ROW."""
    columns = max(16, triton.next_power_of_2(n))
    rows = max(1, min(MOST_ROWS, SHORT_ROWS // columns))
    warps = max(1, columns // KEYS_PER_WARP)
    return rows, columns, max(4, CODES_PER_WARP * warps // rows), warps


def slice_length(rows: int, n: int, k: int) -> int:
    """Length of the slices that a row is cut into, n where one program takes it whole."""
    longest = SLICE if 4 * k <= SLICE else REGISTER_ROW
    even = triton.cdiv(n, max(1, MANY_PROGRAMS // rows))
    length = min(longest, max(even, MIN_SLICE, 4 * k))
    return triton.cdiv(length, ALIGNMENT) * ALIGNMENT if length < n else n


# -- launchers -------------------------------------------------------------------------------------


def topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values [rows, k], indices int64 [rows, k], counts int64 [n] or [0]); x has any strides."""
    counts = _counts(x, count)
    with device_of(x):
        if not sorted:
            values, indices = _select(x, k, relu, abs, counts, torch.int64)
        else:
            codes = _select(x, k, False, abs, None, torch.int32)
            values, indices = order_codes(*codes, relu, abs, counts)
    return values, indices, _or_empty(counts, x)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(masked [rows, n], values [rows, k], indices int64 [rows, k], counts), by ascending index."""
    rows, n = x.shape
    counts = _counts(x, count)
    with device_of(x):
        if slice_length(rows, n, k) < n:
            values, indices = _select(x, k, relu, abs, counts, torch.int64)
            masked = codes_to_dense(values, indices, n)
        else:
            masked = torch.empty(rows, n, dtype=x.dtype, device=x.device)
            values, indices = _select(x, k, relu, abs, counts, torch.int64, masked)
    return masked, values, indices, _or_empty(counts, x)


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Dense [rows, n] of contiguous codes [rows, k]; indices outside 0..n-1 are left out."""
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
    """Codes [rows, k] of x by ascending index, after as many levels as its length asks for."""
    rows, n = x.shape
    if n > REGISTER_ROW and 2 * k > REGISTER_ROW:
        return stream_codes(x, k, relu, abs, counts, index_dtype)
    origin = None
    while (length := slice_length(rows, n, k)) < n:
        slices = triton.cdiv(n, length)
        x, origin = _launch_select(x, origin, k, length, False, abs, None, torch.int32, None)
        n = (slices - 1) * k + min(k, n - (slices - 1) * length)
        x, origin = x[:, :n], origin[:, :n]  # only a last slice shorter than k leaves a rest
    return _launch_select(x, origin, k, n, relu, abs, counts, index_dtype, masked)


def _launch_select(
    x: torch.Tensor,
    origin: torch.Tensor | None,
    k: int,
    length: int,
    relu: bool,
    abs: bool,
    counts: torch.Tensor | None,
    index_dtype: torch.dtype,
    masked: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One level: the k largest of each slice, [rows, slices * k]."""
    rows, n = x.shape
    slices = triton.cdiv(n, length)
    bits = bits_of(x.dtype)
    values = torch.empty(rows, slices * k, dtype=x.dtype, device=x.device)
    indices = torch.empty(rows, slices * k, dtype=index_dtype, device=x.device)
    taken = torch.empty(rows, slices * k, dtype=torch.int32, device=x.device)
    block_rows, columns, codes, warps = row_block(length)
    select_kernel[(triton.cdiv(rows * slices, block_rows),)](
        x.view(bits.integer),
        indices if origin is None else origin,
        values.view(bits.integer),
        indices,
        taken,
        values.view(bits.integer) if masked is None else masked.view(bits.integer),
        indices if counts is None else counts,
        rows,
        n,
        k,
        slices,
        length,
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
        CODES=codes,
        num_warps=warps,
    )
    return values, indices


def _counts(x: torch.Tensor, count: bool) -> torch.Tensor | None:
    return torch.zeros(x.shape[1], dtype=torch.int64, device=x.device) if count else None


def _or_empty(counts: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device) if counts is None else counts
