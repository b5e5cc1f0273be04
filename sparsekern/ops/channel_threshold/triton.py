"""The threshold of each channel.

A tensor is [outer, C, inner]; a channel consists of `outer` runs of `inner` neighbours.

`digits_kernel` counts one digit of the ordered integer keys, the most significant first, among the
elements that agree with the digits before. `extend_kernel` then finds the digit of the element that
is searched. One program of `digits_kernel` owns a part of one channel, or of several if channels
are the last dimension. It reads that part in blocks of BLOCK elements, coalesced in both cases,
counts in registers, and adds its counts to those of the other programs at the end. Sums of integers
do not depend on their order. Float32 takes three passes (four if channels are last), 16 bits take
two; bound by these reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two
from ..triton_keys import bits_of, key_of

# Elements of one step of a program: 16 a thread with 8 warps.
BLOCK = 4096
# Bits of a digit and channels of a program: at most 4096 counts, 16 a thread.
ONE_CHANNEL = (11, 1)
SEVERAL_CHANNELS = (8, 16)
# Above this many channels the counts in memory, 16 KiB for each, would be too many.
MOST_LARGE_COUNTS = 4096
# Programs that share the work, and what a part is worth at least, so that adding up the counts
# stays a small part.
PROGRAMS = 1056
LEAST_PART = 8 * BLOCK


@triton.jit
def digits_kernel(
    x,  # [outer, C, inner] bits
    prefixes,  # [C] int32: keys, as far as they are known
    counts,  # [C, 2 ** BITS] int64
    channels,
    inner,
    size,  # places in a program's channels: outer * inner * SLOTS
    part,  # places of a program, a multiple of BLOCK
    parts,
    shift,
    high,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    TOP: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add #{ x of channel c : (key >> high) = (prefix_c >> high) and digit = d } to counts[c, d].

    digit = (key >> shift) mod 2^(high - shift). The first digit, with TOP, contains the sign, and
    no prefix restricts it. SLOTS > 1 only with inner = 1; LONG: inner >= BLOCK.
    """
    program = tl.program_id(0)
    first = (program // parts).to(tl.int64) * SLOTS
    begin = (program % parts).to(tl.int64) * part
    end = tl.minimum(begin + part, size)
    place = tl.arange(0, BLOCK)
    slot = place % SLOTS
    there = first + slot < channels
    found = tl.zeros([SLOTS << BITS], tl.int32)
    while begin < end:
        if SLOTS > 1:
            row = begin // SLOTS + place // SLOTS
            address = x + row * channels + first + slot
        else:
            run = begin // inner
            column = begin - run * inner
            if LONG:  # at most one run ends in a block
                column = column + place
                runs = (column >= inner).to(tl.int64)
            else:
                column = column.to(tl.int32) + place
                runs = (column // inner).to(tl.int64)
            address = x + ((run + runs) * channels + first - runs) * inner + column
        inside = there & (begin + place < end)
        bits = tl.load(address, mask=inside, other=0).to(tl.int32)
        key = key_of(bits, MAGNITUDE, INFINITY, False)
        if TOP:
            digit = (key >> shift) + (1 << (BITS - 1))
        else:
            prefix = tl.load(prefixes + first + slot, mask=there, other=0)
            digit = (key >> shift) & ((1 << (high - shift)) - 1)
            inside = inside & ((key >> high) == (prefix >> high))
        found += tl.histogram((slot << BITS) + digit, SLOTS << BITS, mask=inside)
        begin += BLOCK
    bins = tl.arange(0, SLOTS << BITS)
    address = counts + (first << BITS) + bins
    tl.atomic_add(address, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit
def extend_kernel(
    counts,  # [C, 2 ** BITS] int64, zeros afterwards
    prefixes,  # [C] int32
    wanted,  # [C] int64: the rank among the elements with the prefix, from 1
    thresholds,  # [C] bits, when LAST
    shift,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    TOP: tl.constexpr,
    LAST: tl.constexpr,
    BITS: tl.constexpr,
):
    """Add digit << shift to prefix_c, the digit of the element of channel c that is searched."""
    channel = tl.program_id(0).to(tl.int64)
    address = counts + (channel << BITS) + tl.arange(0, 1 << BITS)
    found = tl.load(address)
    upto = tl.cumsum(found, axis=0)
    rank = tl.load(wanted + channel)
    digit = tl.sum((upto < rank).to(tl.int32), axis=0)
    before = tl.max(tl.where(upto < rank, upto, 0), axis=0)
    if TOP:
        key = (digit - (1 << (BITS - 1))) << shift
    else:
        key = tl.load(prefixes + channel) + (digit << shift)
    tl.store(prefixes + channel, key)
    tl.store(wanted + channel, rank - before)
    tl.store(address, tl.zeros_like(found))
    if LAST:
        bits = tl.where(key < 0, (-key) | ~MAGNITUDE, key)
        bits = tl.where(key > INFINITY, MAGNITUDE, bits)  # a quiet NaN
        tl.store(thresholds + channel, bits.to(thresholds.dtype.element_ty))


def digit_block(channels: int, inner: int) -> tuple[int, int]:
    """Return the bits of a digit and the channels of one program."""
    if inner > 1 or channels == 1:
        bits, slots = ONE_CHANNEL
        return (bits if channels <= MOST_LARGE_COUNTS else SEVERAL_CHANNELS[0]), slots
    bits, slots = SEVERAL_CHANNELS
    return bits, min(slots, next_power_of_two(channels))


def channel_threshold(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the rank-th smallest of each channel [C] of x [outer, C, inner], contiguous."""
    outer, channels, inner = x.shape
    out = torch.empty(channels, dtype=x.dtype, device=x.device)
    if channels == 0:
        return out
    if channels == 1:
        outer, inner = 1, outer * inner
    bits = bits_of(x.dtype)
    digit, slots = digit_block(channels, inner)
    groups = cdiv(channels, slots)
    size = outer * inner * slots
    parts = max(1, min(PROGRAMS // groups, size // LEAST_PART))
    part = cdiv(cdiv(size, parts), BLOCK) * BLOCK
    parts = cdiv(size, part)
    counts = torch.zeros(channels << digit, dtype=torch.int64, device=x.device)
    prefixes = torch.empty(channels, dtype=torch.int32, device=x.device)
    wanted = torch.full((channels,), rank, dtype=torch.int64, device=x.device)
    constants = {"MAGNITUDE": bits.magnitude, "INFINITY": bits.infinity, "BITS": digit}
    width = 8 * x.itemsize
    high = width
    with device_of(x):
        while high > 0:
            shift = max(0, high - digit)
            digits_kernel[(groups * parts,)](
                x.view(bits.integer), prefixes, counts, channels, inner, size, part, parts, shift,
                high, TOP=high == width, SLOTS=slots, LONG=inner >= BLOCK, BLOCK=BLOCK, num_warps=8,
                **constants,
            )  # fmt: skip
            extend_kernel[(channels,)](
                counts, prefixes, wanted, out.view(bits.integer), shift, TOP=high == width,
                LAST=shift == 0, num_warps=4, **constants,
            )  # fmt: skip
            high = shift
    return out
