"""Floating point numbers as integers that compare in the order of `topk`.

A float's bits are a sign and a magnitude, so the key is the magnitude with the sign applied: -0
and +0 meet at zero, and every NaN is moved to the one place above +inf. Kernels load elements as
sign-extended integers of the same width; what they store is bit for bit what they read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Bits(NamedTuple):
    """The integer dtype of a floating one's width, its magnitude bits, and the bits of +inf."""

    integer: torch.dtype
    magnitude: int
    infinity: int


_BITS = {
    torch.float32: Bits(torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: Bits(torch.int16, 0x7FFF, 0x7F80),
    torch.float16: Bits(torch.int16, 0x7FFF, 0x7C00),
}


def bits_of(dtype: torch.dtype) -> Bits:
    """Return the bits of float32, bfloat16 or float16."""
    return _BITS[dtype]


@triton.jit
def key_of(
    bits,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ABS: tl.constexpr,
    SMALLEST: tl.constexpr = False,
):
    """Return int32 keys, key(a) > key(b) iff a comes before b; -inf -INFINITY, NaN INFINITY + 1.

    With SMALLEST the order is reversed, in the same range.
    """
    magnitude = bits & MAGNITUDE
    key = magnitude
    if not ABS:
        sign = bits >> 31  # 0 or -1
        key = (magnitude ^ sign) - sign
    key = tl.where(magnitude > INFINITY, INFINITY + 1, key)
    if SMALLEST:
        key = 1 - key
    return key


@triton.jit
def rectified(bits, MAGNITUDE: tl.constexpr, INFINITY: tl.constexpr):
    """Return max(v, 0) on bits: negative numbers and -0 become +0, NaN stays as it is."""
    return tl.where((bits < 0) & ((bits & MAGNITUDE) <= INFINITY), 0, bits)


@triton.jit
def fires(bits, MAGNITUDE: tl.constexpr):
    """Return v != 0 on bits, true for NaN."""
    return (bits & MAGNITUDE) != 0
