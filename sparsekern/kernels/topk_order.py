"""Codes put in order of value.

The selection leaves codes by ascending index. One program owns SIDE codes of ROWS rows and counts,
for each, how many codes of its row come before it: k * k comparisons a row in registers, bound by
them, and then one scattered write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .keys import bits_of, fires, ordered_key, rectified

# Comparisons in one tile of the ordering (32 a thread of 4 warps) and the longest side of a tile.
ORDER_TILE = 4096
ORDER_SIDE = 64


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
    """values[r, rank(i)] = codes_values[r, i], rank(i) = #{j : (-key_j, j) < (-key_i, i)}.

    One program owns SIDE codes of ROWS rows and walks over all k codes of those rows, SIDE at a
    time.
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


def order_block(k: int) -> tuple[int, int]:
    """(rows, side) of one program of the ordering."""
    side = min(ORDER_SIDE, max(16, triton.next_power_of_2(k)))
    return (ORDER_TILE // (side * side) if k <= side else 1), side


def order_codes(
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
