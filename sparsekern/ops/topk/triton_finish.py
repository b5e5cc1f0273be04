"""Codes made from the columns of a selection.

The selection leaves the columns of a row in ascending order. One program owns SIDE of them in ROWS
rows: it gathers their values and, for codes in order of value, counts for each how many codes of
its row come before it, walking over all k of them. Bound by the gathers, each of which moves a
whole sector, and for a large k by the k * k comparisons a row, done in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..block_sizes import cdiv, next_power_of_two
from ..triton_keys import bits_of, fires, key_of, rectified

# A tile compares SIDE codes with as many. Up to SMALL_K, one warp owns a tile, 32 pairs a thread:
# with 64 registers a thread, 32 programs wait for their gathers at once. Beyond, larger tiles
# gather less often: 4 warps with up to 168 registers.
SMALL_K = 512
SMALL_SIDE = 32
SIDE = 64
# Codes of one program where nothing is compared: 8 a thread.
CODES = 1024


@triton.jit
def finish_kernel(
    x,  # [rows, n] bits, any strides
    columns,  # [rows, k] int32, ascending
    values,  # [rows, k] bits
    indices,  # [rows, k] int64
    masked,  # [rows, n] bits, zeros, when MASKED
    counts,  # [n] int64, when COUNT
    rows,
    n,
    k,
    row_stride,
    col_stride,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    SMALLEST: tl.constexpr,
    SORTED: tl.constexpr,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write values[r, rank(i)] = x[r, columns[r, i]] and indices[r, rank(i)] = columns[r, i].

    rank(i) = #{j : (-key_j, j) < (-key_i, i)} when SORTED, else i.
    """
    tiles = tl.cdiv(k, SIDE)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    own = tl.program_id(0) % tiles * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (own < k)[None, :]  # [ROWS, SIDE]
    first, starts = (row * k)[:, None], x + (row * row_stride)[:, None]
    latents = tl.load(columns + first + own[None, :], mask=inside, other=0).to(tl.int64)
    bits = tl.load(starts + latents * col_stride, mask=inside, other=0).to(tl.int32)

    rank = tl.broadcast_to(own[None, :], [ROWS, SIDE])
    if SORTED:
        key = key_of(bits, MAGNITUDE, INFINITY, ABS, SMALLEST)[:, :, None]
        rank = tl.zeros([ROWS, SIDE], tl.int32)
        begin = tl.full([], 0, tl.int32)
        while begin < k:
            other = begin + tl.arange(0, SIDE)
            there = (row < rows)[:, None] & (other < k)[None, :]
            column = tl.load(columns + first + other[None, :], mask=there, other=0).to(tl.int64)
            other_bits = tl.load(starts + column * col_stride, mask=there, other=0).to(tl.int32)
            other_key = key_of(other_bits, MAGNITUDE, INFINITY, ABS, SMALLEST)
            other_key = tl.where(there, other_key, -INFINITY - 1)[:, None, :]
            earlier = (other[None, :] < own[:, None])[None, :, :]
            precedes = (other_key > key) | ((other_key == key) & earlier)
            rank += tl.sum(precedes.to(tl.int32), axis=2)
            begin += SIDE

    if RELU:
        bits = rectified(bits, MAGNITUDE, INFINITY)
    tl.store(values + first + rank, bits, mask=inside)
    tl.store(indices + first + rank, latents, mask=inside)
    if MASKED:
        tl.store(masked + (row * n)[:, None] + latents, bits, mask=inside)
    if COUNT:
        ones = tl.full([ROWS, SIDE], 1, tl.int64)
        tl.atomic_add(counts + latents, ones, mask=inside & fires(bits, MAGNITUDE), sem="relaxed")


def finish_block(k: int, sorted: bool) -> tuple[int, int, int]:
    """Return rows, side and warps of one program."""
    small = sorted and k <= SMALL_K
    side = min(SMALL_SIDE if small else SIDE, max(16, next_power_of_two(k)))
    if not sorted:
        return CODES // side, side, 4
    return (SMALL_SIDE // side, side, 1) if small else (1, side, 4)


def finish_codes(
    x: torch.Tensor,
    columns: torch.Tensor,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool,
    masked: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, indices int64 and counts int64 [n] or [0] of columns int32 [rows, k] of x.

    masked, if given, is zeros [rows, n]; the values are written to it, too.
    """
    rows, n = x.shape
    k = columns.shape[1]
    bits = bits_of(x.dtype)
    values = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    counts = torch.zeros(n if count else 0, dtype=torch.int64, device=x.device)
    block_rows, side, warps = finish_block(k, sorted)
    finish_kernel[(cdiv(rows, block_rows) * cdiv(k, side),)](
        x.view(bits.integer),
        columns,
        values.view(bits.integer),
        indices,
        values.view(bits.integer) if masked is None else masked.view(bits.integer),
        counts if count else indices,
        rows,
        n,
        k,
        *x.stride(),
        MAGNITUDE=bits.magnitude,
        INFINITY=bits.infinity,
        ABS=abs,
        SMALLEST=smallest,
        SORTED=sorted,
        RELU=relu,
        MASKED=masked is not None,
        COUNT=count,
        ROWS=block_rows,
        SIDE=side,
        num_warps=warps,
    )
    return values, indices, counts
