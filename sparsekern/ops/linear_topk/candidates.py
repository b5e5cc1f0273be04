"""The latents that may be among the k largest of each row, and bounds of their scores' errors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .rounded import Rounded

# Candidates of a row that there is room for, as multiples of k; at least so many.
CANDIDATES_PER_CODE = 16
LEAST_CANDIDATES = 512

ROUNDOFF = 2.0**-24  # of float32
SMALLEST = 2.0**-126  # the smallest normal number, also of bfloat16
# bfloat16 has 8 bits: a result is off by at most half a unit in the last place.
SCORE_ERRORS = {torch.bfloat16: 2.0**-8 / (1 - 2.0**-8), torch.float32: 0.0}
# For the bounds' own arithmetic: of factors, and of the sum of a score, its bias and its bound.
SLACK = 1 + 2.0**-16
OWN_ERROR = 2.0**-20
# Roundings that a product may take for each term of a sum, by device. The tensor cores of a GPU
# align the terms of a few products and cut off what is below: up to two roundings each, and two
# more where what was cut is added to the sum.
ROUNDINGS_PER_TERM = {"cpu": 1, "cuda": 4}


class ErrorBound(NamedTuple):
    """What bounds the errors of scores that were computed from rounded rows.

    |exact - (score + bias) * scale| is at most |scale| times x_errors[b] * lengths[i]
    + x_lengths[b] * errors[i] + of_score * |score| + of_bias * |bias|, plus `least`.

    Attributes:
        x_errors: [rows] float32.
        x_lengths: [rows] float32.
        lengths: [width] float32, of the latents of a slice.
        errors: [width] float32.
        of_score: relative.
        of_bias: relative.
        least: absolute.
    """

    x_errors: torch.Tensor
    x_lengths: torch.Tensor
    lengths: torch.Tensor
    errors: torch.Tensor
    of_score: float
    of_bias: float
    least: float


def error_bound(
    factors: tuple[torch.Tensor, torch.Tensor], weight: Rounded, scores: torch.dtype
) -> ErrorBound:
    """Return the bound for scores of a dtype; weight: the latents' rows, as they were used."""
    return ErrorBound(
        *factors,
        weight.lengths,
        weight.errors,
        SLACK * (SCORE_ERRORS[scores] + OWN_ERROR),
        OWN_ERROR,
        (4 * weight.rows.shape[1] + 16) * SMALLEST,
    )


def factors_of_bounds(x: Rounded, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors [rows] of the lengths and of the errors of the weight in the bound.

    The sums of both products, the screening one and the float32 one it is compared with, are off by
    at most depth roundings (on a GPU the first one by more) of the sum of magnitudes, in whatever
    order they are made.
    """
    roundings = 1 + ROUNDINGS_PER_TERM.get(x.rows.device.type, 1)
    sums = roundings * (depth + 16) * ROUNDOFF * SLACK
    longest = x.lengths + x.errors
    return (x.errors + sums * longest) * SLACK, longest * ((1 + sums) * SLACK)


class Candidates:
    """The latents that may be among the k largest of each row, brought up to date by slices.

    Attributes:
        latents: [rows, capacity] int32, ascending; the first ones are valid.
        lower: [rows, capacity] float32, bounds of their exact scores.
        upper: [rows, capacity] float32.
        counts: [rows] int32, how many; -1 where there were too many.
        thresholds: [rows] float32, which k exact scores reach; NaN before there are so many.
        best: [rows, at most k] float32, the largest lower bounds of different latents, for kernels
            that keep these instead of `lower` (triton.py); None before the first slice.
    """

    best: torch.Tensor | None = None

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self.capacity = max(LEAST_CANDIDATES, CANDIDATES_PER_CODE * k)
        self.latents = torch.empty(rows, self.capacity, dtype=torch.int32, device=device)
        self.lower, self.upper = torch.empty(
            2, rows, self.capacity, dtype=torch.float32, device=device
        )
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.thresholds = torch.full((rows,), torch.nan, dtype=torch.float32, device=device)

    def share_crowded(self) -> float:
        """Return the share of rows that had too many candidates."""
        return float((self.counts < 0).float().mean())
