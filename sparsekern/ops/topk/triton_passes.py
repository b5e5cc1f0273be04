"""The k largest of rows too long for registers when k is too large for slices.

One program owns one row and reads it in blocks of BLOCK columns, several times: each search pass
counts the keys at or above WAYS thresholds at once and so divides the range of the k-th key by
WAYS (11 passes for float32, 6 for the 16-bit dtypes), and one last pass writes the columns in
order, carrying two running counts. Bound by these reads; this is the path for any k up to n, not
the fast one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_keys import bits_of, key_of

# Thresholds a pass counts: 3 bits of the key. BLOCK * WAYS running counts are 64 a thread with 4
# warps.
WAYS = 8
BLOCK = 1024


@triton.jit
def load_bits(row, begin, n, col_stride, BLOCK: tl.constexpr):
    """Load columns begin .. begin + BLOCK of the row at pointer `row`; return bits and a mask."""
    columns = begin + tl.arange(0, BLOCK)
    inside = columns < n
    bits = tl.load(row + columns * col_stride, mask=inside, other=0).to(tl.int32)
    return bits, inside


@triton.jit
def passes_kernel(
    x,  # [rows, n] bits, any strides
    taken,  # [rows, k] int32
    n,
    k,
    row_stride,
    col_stride,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    SMALLEST: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to taken[row, :] the columns of the k largest of x[row, :], ascending.

    Invariant of the search: #{key >= low} >= k > #{key >= high} = above. It ends at low + 1 = high,
    so the bound low is the k-th key, and k - above elements equal to it are taken.
    """
    program = tl.program_id(0).to(tl.int64)
    row = x + program * row_stride

    low = tl.full([], -INFINITY, tl.int32)
    high = tl.full([], INFINITY + 2, tl.int32)
    above = tl.full([], 0, tl.int32)
    while low + 1 < high:
        width = high.to(tl.int64) - low.to(tl.int64)
        trial = (low + width * tl.arange(0, WAYS) // WAYS).to(tl.int32)  # [WAYS], the first is low
        counts = tl.zeros([WAYS, BLOCK], tl.int32)
        begin = tl.full([], 0, tl.int64)  # int64: the last step may pass 2^31
        while begin < n:
            bits, inside = load_bits(row, begin, n, col_stride, BLOCK)
            key = key_of(bits, MAGNITUDE, INFINITY, ABS, SMALLEST)
            key = tl.where(inside, key, -INFINITY - 1)
            counts += (key[None, :] >= trial[:, None]).to(tl.int32)
            begin += BLOCK
        count = tl.sum(counts, axis=1)
        low = tl.max(tl.where(count >= k, trial, low), axis=0)
        high = tl.min(tl.where(count < k, trial, high), axis=0)
        above = tl.max(tl.where(count < k, count, above), axis=0)

    wanted = k - above
    above_before = tl.full([], 0, tl.int32)
    tied_before = tl.full([], 0, tl.int32)
    begin = tl.full([], 0, tl.int64)
    while begin < n:
        bits, inside = load_bits(row, begin, n, col_stride, BLOCK)
        key = key_of(bits, MAGNITUDE, INFINITY, ABS, SMALLEST)
        is_above = (inside & (key > low)).to(tl.int32)
        is_tied = (inside & (key == low)).to(tl.int32)
        ranks = tl.cumsum(is_above + (is_tied << 16), axis=0)
        tied_rank = tied_before + (ranks >> 16)
        take = (is_above > 0) | ((is_tied > 0) & (tied_rank <= wanted))
        place = above_before + (ranks & 0xFFFF) + tl.minimum(tied_rank, wanted) - 1
        columns = begin + tl.arange(0, BLOCK)
        tl.store(taken + program * k + place, columns.to(tl.int32), mask=take)
        above_before += tl.sum(is_above, axis=0)
        tied_before += tl.sum(is_tied, axis=0)
        begin += BLOCK


def columns_by_passes(x: torch.Tensor, k: int, abs: bool, smallest: bool) -> torch.Tensor:
    """Return columns int32 [rows, k] of the k largest of each row of x [rows, n], ascending."""
    rows, n = x.shape
    bits = bits_of(x.dtype)
    taken = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    passes_kernel[(rows,)](
        x.view(bits.integer),
        taken,
        n,
        k,
        *x.stride(),
        MAGNITUDE=bits.magnitude,
        INFINITY=bits.infinity,
        ABS=abs,
        SMALLEST=smallest,
        WAYS=WAYS,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return taken
