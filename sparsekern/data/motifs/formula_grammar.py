r"""Random formulas as token sequences of a given length, from a weighted context-free grammar.

    E -> c            weight 1, each of the 16 characters c equally likely
       | c ^{ E }     and all that follow weight 0.25
       | c _{ E }
       | E + E
       | E E
       | ( E )
       | \frac{ E }{ E }

With these tokens and weights, lengths of 1 to 30 tokens, equally likely, give 9.6 characters and
bars a formula; 9.64 is what the authors of the Sparling study (arXiv 2302.01976) count in theirs.

A formula of length n is drawn from the distribution of all formulas given that length, which is
that of drawing until one has the length, without the drawing: the weight of all formulas of each
length is known, so each production can be chosen with the share of weight that it leads to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import NamedTuple

DIGITS_AND_LETTERS = tuple("0123456789xyzabc")
CHARACTERS = (*DIGITS_AND_LETTERS, "+", "(", ")")
SUPERSCRIPT, SUBSCRIPT, FRACTION, OVER, END = "^{", "_{", "\\frac{", "}{", "}"
TOKENS = (*CHARACTERS, SUPERSCRIPT, SUBSCRIPT, FRACTION, OVER, END)
CHARACTER_WEIGHT, OTHER_WEIGHT = 1.0, 0.25


class _Production(NamedTuple):
    """Tokens before, between and after the parts; before may be led by a random character."""

    leads: bool
    before: tuple[str, ...]
    between: tuple[str, ...]
    after: tuple[str, ...]
    parts: int

    @property
    def own(self) -> int:
        """Tokens that are not of the parts."""
        return self.leads + len(self.before) + len(self.between) + len(self.after)


_CHARACTER = _Production(True, (), (), (), 0)
_OTHERS = (
    _Production(True, (SUPERSCRIPT,), (), (END,), 1),
    _Production(True, (SUBSCRIPT,), (), (END,), 1),
    _Production(False, (), ("+",), (), 2),
    _Production(False, (), (), (), 2),
    _Production(False, ("(",), (), (")",), 1),
    _Production(False, (FRACTION,), (OVER,), (END,), 2),
)


class _Choices(NamedTuple):
    """Ways to make a formula of one length: productions with the length of their first part."""

    ways: tuple[tuple[_Production, int], ...]
    cumulative: tuple[float, ...]

    @property
    def weight(self) -> float:
        return self.cumulative[-1]


@cache
def _choices(length: int) -> _Choices:
    """List the ways to make a formula of ``length`` tokens, with their weights."""
    total = CHARACTER_WEIGHT + OTHER_WEIGHT * len(_OTHERS)
    ways: list[tuple[_Production, int]] = []
    weights: list[float] = []
    if length == 1:
        ways.append((_CHARACTER, 0))
        weights.append(CHARACTER_WEIGHT / total)
    for production in _OTHERS:
        rest = length - production.own
        firsts = range(1, rest) if production.parts == 2 else [rest] * (rest > 0)
        for first in firsts:
            weight = OTHER_WEIGHT / total * _choices(first).weight
            if production.parts == 2:
                weight *= _choices(rest - first).weight
            ways.append((production, first))
            weights.append(weight)
    return _Choices(tuple(ways), tuple(accumulate(weights)))


def numbers_of(length: int) -> int:
    """Bound the random numbers that :func:`formula` takes for a length of 1 or more."""
    # Two for each production that leads with a character, one for each other. Those that add no
    # token, E E, are fewer than those that are a character.
    return 3 * length


def formula(length: int, fractions: Iterator[float]) -> tuple[str, ...]:
    """Draw a random formula of ``length`` tokens, 1 or more.

    Args:
        length: number of tokens.
        fractions: random numbers in [0, 1), at least :func:`numbers_of` of them.
    """
    choices = _choices(length)
    chosen = bisect_right(choices.cumulative, next(fractions) * choices.weight)
    production, first = choices.ways[min(chosen, len(choices.ways) - 1)]
    tokens: tuple[str, ...] = ()
    if production.leads:
        tokens = (DIGITS_AND_LETTERS[int(next(fractions) * len(DIGITS_AND_LETTERS))],)
    tokens += production.before
    if production.parts:
        tokens += formula(first, fractions)
    if production.parts == 2:
        rest = length - production.own - first
        tokens += production.between + formula(rest, fractions)
    return tokens + production.after


def motifs_of(tokens: tuple[str, ...]) -> int:
    """Count the characters and fraction bars of a formula."""
    return sum(token in CHARACTERS or token == FRACTION for token in tokens)


@cache
def mean_motifs(length: int) -> float:
    """Compute the expected number of characters and fraction bars of ``length`` tokens."""
    ways, cumulative = _choices(length)
    total = 0.0
    for (production, first), below, upto in zip(ways, (0.0, *cumulative), cumulative, strict=False):
        mean = float(production.leads) + motifs_of(production.before + production.between)
        mean += motifs_of(production.after)
        if production.parts:
            mean += mean_motifs(first)
        if production.parts == 2:
            mean += mean_motifs(length - production.own - first)
        total += (upto - below) * mean
    return total / cumulative[-1]
