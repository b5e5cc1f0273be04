"""Sizes of grids and blocks.

triton.cdiv and triton.next_power_of_2 are functions of kernels, too, and take 6 to 8 us a call on
the host; a launch needs several.
"""

from __future__ import annotations


def cdiv(size: int, part: int) -> int:
    """Return how many parts cover a size: size / part, rounded up."""
    return -(-size // part)


def next_power_of_two(size: int) -> int:
    """Return the least power of two that is not below a size of 1 or more."""
    return 1 << (size - 1).bit_length()
