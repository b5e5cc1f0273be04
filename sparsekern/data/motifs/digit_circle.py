"""Digits on a circle: noisy binary images whose label is the digits in angular order.

How an image is made, with the published parameters: a circle of random radius and place that fits
the image; 3 to 6 distinct digits at random angles with a smallest gap; each moved by up to 3
pixels; every stamp overwrites its box of a background that is on with probability 1/8; finally
every pixel flips with probability 1/20. The label starts at the smallest digit and goes round
clockwise, as seen on the image with row 0 on top.

Boxes of two stamps never overlap, which the theory of the motifs asks for: a layout (circle,
angles, moves) with an overlap is drawn anew, the digits stay. The published procedure lets stamps
overlap: 4 % of its layouts do, 13 % of those with six digits. The tiny domain has none to redraw.

Source: Gupta, Osera, Solar-Lezama, arXiv 2302.01976, section "DigitCircle"; the bitmaps are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..counter_random import coins, fractions, integers, words
from .digit_stamps import STAMPS
from .domain import NONE, MotifBatch, MotifDomain, Replacement, check_parameters

# The smaller, easier domain: delta* = 9.57e-4 with four channels.
TINY: dict[str, Any] = {
    "name": "tiny",
    "stamps": "7x5",
    "digits": "0147",
    "side": 28,
    "distinct": (2, 4),
    "radii": (8.5, 10.0),
    "clearance": 4,
    "shift": 0,
    "gap": 0.19,
    "background": 0.05,
    "flips": 0.03,
}

# Positions of the random numbers of a sample; those of layouts follow each other from LAYOUT on.
DIGITS, LAYOUT, BACKGROUND, FLIPS = 0, 1 << 8, 1 << 32, 1 << 40
ATTEMPTS = 1000


class _Layout(NamedTuple):
    """Upper left corners of the stamps, int64 [B, M]; only those of a sample's digits count."""

    tops: np.ndarray
    lefts: np.ndarray


@dataclass(frozen=True)
class DigitCircle(MotifDomain):
    """The domain with its parameters; the defaults are the published ones.

    Attributes:
        name: for reports.
        stamps: which bitmaps, a key of :data:`~.digit_stamps.STAMPS`.
        digits: the kinds of digits, ascending.
        side: rows and columns of an image.
        distinct: smallest and largest number of digits of an image, drawn uniformly.
        radii: of the circle, drawn uniformly.
        clearance: smallest distance of the circle from the border.
        shift: each stamp moves by -shift .. shift rows and columns.
        gap: smallest gap between neighbouring angles, in turns; ``None`` for half of an even
            spacing, 1 / (2 n). Given that, all angles are equally likely.
        background: probability of a background pixel to be on.
        flips: probability of a pixel to flip in the end.

    Raises:
        ValueError: the parameters contradict each other.
    """

    name: str = "digit-circle"
    stamps: str = "12x8"
    digits: str = "0123456789"
    side: int = 100
    distinct: tuple[int, int] = (3, 6)
    radii: tuple[float, float] = (20.0, 35.0)
    clearance: float = 15
    shift: int = 3
    gap: float | None = None
    background: float = 0.125
    flips: float = 0.05

    def __post_init__(self) -> None:
        known = STAMPS.get(self.stamps, {})
        check_parameters(self, ("stamps", bool(known), f"must be one of {', '.join(STAMPS)}"))
        ascending = sorted(set(self.digits) & set(known))
        least = (max(known["0"].shape) + 1) / 2 + self.shift
        largest = self.side / 2 - self.clearance
        low, high = self.radii
        fewest, most = self.distinct
        check_parameters(
            self,
            ("digits", list(self.digits) == ascending, f"must be some of {''.join(known)}, sorted"),
            (
                "distinct",
                1 <= fewest <= most <= len(self.digits),
                f"must be a range within 1..{len(self.digits)} (the number of digits)",
            ),
            ("shift", self.shift >= 0, "must be 0 or more"),
            (
                "clearance",
                self.clearance >= least,
                f"must be at least {least} (half a stamp, half a pixel and the shift)",
            ),
            (
                "radii",
                0 < low <= high <= largest,
                f"must be a range above 0, up to {largest} (half the side without the clearance)",
            ),
            (
                "gap",
                self.gap is None or 0 <= self.gap * most <= 1,
                f"must lie in 0..1/{most} (of the largest number of digits)",
            ),
            ("background", 0 <= self.background <= 1, "must lie in 0..1"),
            ("flips", 0 <= self.flips <= 1, "must lie in 0..1"),
        )

    @property
    def symbols(self) -> tuple[str, ...]:
        """The kinds of digits."""
        return tuple(self.digits)

    @property
    def space(self) -> tuple[int, ...]:
        """Rows and columns of an image."""
        return (self.side, self.side)

    @property
    def max_length(self) -> int:
        """The largest number of digits of an image."""
        return self.distinct[1]

    @property
    def max_motifs(self) -> int:
        """The largest number of digits of an image."""
        return self.distinct[1]

    def mean_motifs(self) -> float:
        """Compute the expected number of digits of an image."""
        return sum(self.distinct) / 2

    def bitmaps(self) -> np.ndarray:
        """Stack the stamps of the symbols, uint8 ``[n, rows, columns]`` of 0 and 1."""
        return np.stack([STAMPS[self.stamps][digit] for digit in self.digits])

    def draw(self, start: np.ndarray) -> MotifBatch:
        """Draw the images whose random numbers start at ``start``, uint64 ``[B]``."""
        labels, counts = self._sequences(start)
        layout = self._layouts(start, counts)
        order = self._from_smallest(labels, counts)
        labels, tops, lefts = (np.take_along_axis(array, order, 1) for array in (labels, *layout))
        _, rows, columns = self.bitmaps().shape
        motifs = np.stack([labels, tops, tops + rows, lefts, lefts + columns], -1)
        absent = np.arange(self.max_motifs) >= counts[:, None]
        labels[absent] = NONE
        motifs[absent] = NONE
        inputs = self._images(start, motifs)
        return MotifBatch(*(torch.from_numpy(array) for array in (inputs, labels, motifs)))

    @property
    def origin(self) -> str:
        """Whether the images are the published ones, for reports."""
        if self != DigitCircle():
            return "digits on a circle, smaller or easier than the published domain: our own"
        return "digits on a circle as published, with bitmaps of our own and without overlaps"

    def replacements(self, label: list[int], symbols: list[int]) -> list[Replacement]:
        """List every way to make one digit another that the image does not have.

        The label that follows starts at its smallest digit, too.
        """
        possible = []
        for motif, symbol in enumerate(symbols):
            for other in range(len(self.digits)):
                if other not in label:
                    digits = [other if digit == symbol else digit for digit in label]
                    first = digits.index(min(digits))
                    possible.append(Replacement(motif, other, digits[first:] + digits[:first]))
        return possible

    def _sequences(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw distinct digits in angular order int64 [B, M], and how many count int64 [B]."""
        fewest, most = self.distinct
        numbers = words(start, DIGITS, 1 + len(self.digits))
        counts = fewest + integers(numbers[:, 0], most - fewest + 1)
        return np.argsort(numbers[:, 1:], axis=1, kind="stable")[:, :most], counts

    def _from_smallest(self, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Find the place of each digit when the label starts at its smallest, int64 [B, M]."""
        places = np.arange(self.max_motifs)
        first = np.where(places < counts[:, None], labels, len(self.digits)).argmin(1)
        old_places: np.ndarray = (first[:, None] + places) % counts[:, None]
        return old_places

    def _layouts(self, start: np.ndarray, counts: np.ndarray) -> _Layout:
        """Draw layouts without an overlap: attempts until there is none.

        Raises:
            RuntimeError: there is an overlap in all of 1000 attempts for some sample.
        """
        layout = _Layout(*np.empty((2, len(start), self.max_motifs), np.int64))
        todo = np.arange(len(start))
        for attempt in range(ATTEMPTS):
            layouts = self._attempt(start[todo], counts[todo], attempt)
            for whole, part in zip(layout, layouts, strict=True):
                whole[todo] = part
            todo = todo[self._overlap(layouts, counts[todo])]
            if not len(todo):
                return layout
        raise RuntimeError(
            f"DigitCircle: stamps overlap in all of {ATTEMPTS} layouts: take fewer digits, larger "
            f"radii or a larger gap, got {self}"
        )

    def _attempt(self, start: np.ndarray, counts: np.ndarray, attempt: int) -> _Layout:
        """Draw layouts that may have overlaps, new ones for each attempt."""
        most = self.max_motifs
        number = 4 + 3 * most
        random = words(start, LAYOUT + attempt * number, number)
        share = fractions(random)
        radius = self.radii[0] + (self.radii[1] - self.radii[0]) * share[:, :1]
        room = self.side - 2 * (radius + self.clearance)
        centre_row, centre_column = (
            radius + self.clearance + room * share[:, place : place + 1] for place in (1, 2)
        )
        # Gaps between uniformly random angles are a Dirichlet variable, normalised exponentials;
        # given a smallest gap g, they are g plus what is left, divided in the same way.
        present = np.arange(most) < counts[:, None]
        parts = np.where(present, -np.log1p(-share[:, 4 : 4 + most]), 0)
        parts /= parts.sum(1, keepdims=True)
        gap = 1 / (2 * counts[:, None]) if self.gap is None else self.gap
        gaps = gap + (1 - counts[:, None] * gap) * parts
        angles = 2 * np.pi * (share[:, 3:4] + gaps.cumsum(1))
        shifts = integers(random[:, 4 + most :], 2 * self.shift + 1) - self.shift
        _, rows, columns = self.bitmaps().shape
        tops = np.floor(centre_row + radius * np.sin(angles) - rows / 2 + 0.5).astype(np.int64)
        lefts = np.floor(centre_column + radius * np.cos(angles) - columns / 2 + 0.5)
        return _Layout(tops + shifts[:, :most], lefts.astype(np.int64) + shifts[:, most:])

    def _overlap(self, layout: _Layout, counts: np.ndarray) -> np.ndarray:
        """Tell whether any two boxes of a sample share a pixel, bool [B]."""
        one, other = np.triu_indices(self.max_motifs, 1)
        _, rows, columns = self.bitmaps().shape
        near = np.abs(layout.tops[:, one] - layout.tops[:, other]) < rows
        near &= np.abs(layout.lefts[:, one] - layout.lefts[:, other]) < columns
        near &= other < counts[:, None]
        overlapping: np.ndarray = near.any(1)
        return overlapping

    def _images(self, start: np.ndarray, motifs: np.ndarray) -> np.ndarray:
        """Draw images uint8 [B, 1, side, side] of motifs int64 [B, M, 5]."""
        pixels = self.side**2
        images = coins(start, BACKGROUND, pixels, self.background).view(np.uint8)
        bitmaps = self.bitmaps()
        _, rows, columns = bitmaps.shape
        within = (np.arange(rows)[:, None] * self.side + np.arange(columns)).ravel()
        sample, place = np.nonzero(motifs[:, :, 0] != NONE)
        symbol, top, _, left, _ = motifs[sample, place].T
        first = sample * pixels + top * self.side + left
        images.reshape(-1)[first[:, None] + within] = bitmaps.reshape(len(bitmaps), -1)[symbol]
        images ^= coins(start, FLIPS, pixels, self.flips).view(np.uint8)
        return images.reshape(-1, 1, self.side, self.side)
