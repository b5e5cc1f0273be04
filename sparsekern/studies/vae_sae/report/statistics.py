"""Means over seeds, differences between them with 95 % intervals, and the verdict on a cure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from ...._system import require

CURED_BELOW = 0.05
CONFIDENCE = 0.95
NO_INTERVAL = "fewer than 2 seeds, so no verdict"
NOT_SHOWN = "no difference shown"


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds."""

    mean: float
    sd: float | None
    """None for one seed."""
    n: int

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Format mean ± sd; without ± for one seed."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.sd is None else f"{mean} ± {scale * self.sd:.{digits}f}"

    def percent(self) -> str:
        """Format a share as percent, without the sign."""
        return self.text(1, 100)


def spread(values: Iterable[float]) -> Spread:
    """Compute mean and deviation of at least one value."""
    numbers = list(values)
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), sd, len(numbers))


class Difference(NamedTuple):
    """A mean difference and the ends of its 95 % interval."""

    mean: float
    low: float | None
    """None, as the other end, where an arm has one seed."""
    high: float | None
    seeds: str
    """How many, in words."""

    @property
    def shown(self) -> int | None:
        """1 or -1 where the interval lies above or below 0, 0 where it holds 0; None without."""
        if self.low is None or self.high is None:
            return None
        return int(self.low > 0) - int(self.high < 0)

    def text(self, digits: int = 1, scale: float = 1.0, unit: str = "") -> str:
        """Format as "+2.1 (95 % interval +0.3 to +3.9, 3 seeds each)"."""
        value = _with_sign(self.mean, digits, scale) + unit
        ends = self._interval_ends(digits, scale)
        if ends is None:
            return f"{value} ({self.seeds}: no interval)"
        return f"{value} (95 % interval {ends}, {self.seeds})"

    def brief(self, digits: int = 1, scale: float = 1.0) -> str:
        """Format as "+2.1 (+0.3 to +3.9)", for a table that says what the brackets are."""
        value, ends = _with_sign(self.mean, digits, scale), self._interval_ends(digits, scale)
        return value if ends is None else f"{value} ({ends})"

    def _interval_ends(self, digits: int, scale: float) -> str | None:
        if self.low is None or self.high is None:
            return None
        return f"{_with_sign(self.low, digits, scale)} to {_with_sign(self.high, digits, scale)}"

    def points(self) -> str:
        """Format a difference of shares, in words."""
        return self.text(1, 100, " percentage points")


def _with_sign(value: float, digits: int, scale: float) -> str:
    # The sum: no sign before a zero that rounding made.
    return f"{round(scale * value, digits) + 0.0:+.{digits}f}"


def counted(count: int, name: str) -> str:
    """Count in words: "1 seed", "3 seeds"."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def in_words(difference: Difference, more: str, less: str) -> str:
    """Say what an interval shows: one of the words, or that it shows nothing."""
    return {1: more, -1: less, 0: NOT_SHOWN, None: NO_INTERVAL}[difference.shown]


def span(values: list[int]) -> str:
    """Format a range as "36", or "35 to 37"."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def welch(one: Spread, two: Spread) -> Difference:
    """Subtract two from one, whose seeds are independent; the interval is Welch's t.

    mean +- t(df) s,  s^2 = s1^2 / n1 + s2^2 / n2,
    df = s^4 / ((s1^2 / n1)^2 / (n1 - 1) + (s2^2 / n2)^2 / (n2 - 1))
    """
    mean = one.mean - two.mean
    seeds = f"{counted(one.n, 'seed')} each"
    if one.n != two.n:
        seeds = f"{one.n} and {counted(two.n, 'seed')}"
    if one.sd is None or two.sd is None:
        return Difference(mean, None, None, seeds)
    parts = [(s**2 / n, n) for s, n in ((one.sd, one.n), (two.sd, two.n))]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(mean, mean, mean, seeds)
    freedom = variance**2 / sum(part**2 / (n - 1) for part, n in parts)
    half = _quantile(freedom) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half, seeds)


def paired_change(values: Spread) -> Difference:
    """Average values that are differences within a run; the interval is Student's t."""
    seeds = counted(values.n, "seed")
    if values.sd is None:
        return Difference(values.mean, None, None, seeds)
    half = _quantile(values.n - 1) * values.sd / math.sqrt(values.n)
    return Difference(values.mean, values.mean - half, values.mean + half, seeds)


def _quantile(freedom: float) -> float:
    """Look up the quantile of Student's t that ends the interval."""
    student = require("scipy.stats", "the report's intervals").t
    return float(student.ppf(0.5 + CONFIDENCE / 2, freedom))


class Verdict(NamedTuple):
    """Of a cure, by the rule in :func:`verdict`; None where one seed cannot decide."""

    alive: bool
    reconstruction: bool | None
    mig: bool | None
    blind: bool
    """The uncured arm's MIG scatters so widely that less than half of it would be no worse."""

    @property
    def all(self) -> bool:
        """Whether it is a yes three times."""
        return self.alive and self.reconstruction is True and self.mig is True


def verdict(
    dead: Spread, reconstruction: tuple[Spread, Spread], mig: tuple[Spread, Spread]
) -> Verdict:
    """Decide whether a cure is one.

    The allowance is the uncured arm's own standard deviation over seeds, so that a cure's scatter
    cannot help it.

    Args:
        dead: share of never active units of the cured arm; its mean must be below 5 %.
        reconstruction: nats, cured and uncured; the cured mean may exceed the uncured one by the
            allowance.
        mig: cured and uncured; the cured mean may fall below the uncured one by as much.
    """
    worse, lower = reconstruction[1].sd, mig[1].sd
    return Verdict(
        dead.mean < CURED_BELOW,
        None if worse is None else reconstruction[0].mean <= reconstruction[1].mean + worse,
        None if lower is None else mig[0].mean >= mig[1].mean - lower,
        lower is not None and mig_floor(mig[1]) < mig[1].mean / 2,
    )


def mig_floor(uncured: Spread) -> float:
    """Compute the least MIG that is no worse; 0 where the rule would allow less."""
    return max(0.0, uncured.mean - (uncured.sd or 0.0))
