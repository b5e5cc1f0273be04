"""Sizes of grids and blocks, against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

from sparsekern.ops.block_sizes import cdiv, next_power_of_two


def test_cdiv_rounds_up():
    for size in (*range(70), 2**31 - 1, 2**62 + 1):
        for part in range(1, 9):
            assert cdiv(size, part) == math.ceil(Fraction(size, part))


def test_next_power_of_two_is_the_least():
    for size in (*range(1, 70), 2**31 - 1, 2**31, 2**31 + 1):
        power = next_power_of_two(size)
        assert power.bit_count() == 1 and power // 2 < size <= power
