r"""Noisy binary pictures of formulas, labelled with their LaTeX tokens.

A formula of 1 to 30 tokens, all lengths equally likely, from the grammar of
:mod:`.formula_grammar`, is set in Computer Modern at 200 dots per inch
(:mod:`.formula_pictures`) and put at a random place of a 120 x 360 canvas; one that does not fit
(1 %) is replaced by another of the same length. Then every pixel that is not ink becomes ink with
probability 1/4. Ink is 1, paper is 0.

Motifs are the 19 characters and the fraction bar, each with the box of its ink. The label's tokens
are the characters and ``^{``, ``_{``, ``\frac{``, ``}{``, ``}``.

Source: Gupta, Osera, Solar-Lezama, arXiv 2302.01976, section "LaTeX-OCR". The weights of the
grammar are partly ours, see there; so are the font size and the random place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..counter_random import coins, fractions, integers, words
from . import formula_grammar
from .domain import NONE, MotifBatch, MotifDomain, Replacement, check_parameters
from .formula_pictures import POINTS_PER_INCH, SYMBOLS, Picture, picture

# Positions of the random numbers of a sample; those of formulas follow each other from FORMULA on.
LENGTH, PLACE, FORMULA, NOISE = 0, 1, 1 << 8, 1 << 32
ATTEMPTS = 1000


@dataclass(frozen=True)
class LatexFormulas(MotifDomain):
    """The domain with its parameters.

    Attributes:
        name: for reports.
        canvas: rows and columns of an input.
        longest: tokens of the longest formulas.
        points: font size.
        dots_per_inch: with the font size, the size in pixels.
        noise: probability of a pixel that is not ink to become ink.

    Raises:
        ValueError: a parameter is out of range.
    """

    name: str = "latex"
    canvas: tuple[int, int] = (120, 360)
    longest: int = 30
    points: float = 14.0
    dots_per_inch: float = 200.0
    noise: float = 0.25

    margin = 2
    one_to_one = False

    def __post_init__(self) -> None:
        check_parameters(
            self,
            ("canvas", min(self.canvas) >= 1, "must be rows and columns, 1 or more"),
            ("longest", self.longest >= 1, "must be 1 or more"),
            ("points", self.points > 0, "must be positive"),
            ("dots_per_inch", self.dots_per_inch > 0, "must be positive"),
            ("noise", 0 <= self.noise <= 1, "must lie in 0..1"),
        )

    @property
    def origin(self) -> str:
        """How far the formulas are the published ones, for reports."""
        return (
            "formulas as published, with token weights of our own; an activation in the regions of "
            "two motifs counts for the first one, which leaves fraction bars and parentheses "
            "without one at times, whatever found them"
        )

    @property
    def symbols(self) -> tuple[str, ...]:
        """The 19 characters and the fraction bar."""
        return SYMBOLS

    @property
    def label_symbols(self) -> tuple[str, ...]:
        """The tokens."""
        return formula_grammar.TOKENS

    @property
    def space(self) -> tuple[int, ...]:
        """Rows and columns of an input."""
        return self.canvas

    @property
    def max_length(self) -> int:
        """Tokens of the longest formulas."""
        return self.longest

    @property
    def max_motifs(self) -> int:
        """The largest number of motifs, each of which has a token of its own."""
        return self.longest  # each motif has a token of its own

    @property
    def font_pixels(self) -> float:
        """The font size in pixels."""
        return self.points * self.dots_per_inch / POINTS_PER_INCH

    def mean_motifs(self) -> float:
        """Compute the expected number of motifs of a formula, of any that the grammar makes.

        Long ones that do not fit the canvas are replaced by shorter ones, which makes the true mean
        smaller, by about 0.05 with the default parameters.
        """
        lengths = range(1, self.longest + 1)
        return sum(map(formula_grammar.mean_motifs, lengths)) / self.longest

    def draw(self, start: np.ndarray) -> MotifBatch:
        """Draw the pictures whose random numbers start at ``start``, uint64 ``[B]``."""
        count, (rows, columns) = len(start), self.canvas
        inputs = coins(start, NOISE, rows * columns, self.noise).view(np.uint8)
        inputs = inputs.reshape(count, 1, rows, columns)
        labels = np.full((count, self.longest), NONE)
        motifs = np.full((count, self.max_motifs, 5), NONE)
        for sample in range(count):
            tokens, drawn = self._formula(start[sample : sample + 1])
            height, width = drawn.ink.shape
            room = np.array([rows - height + 1, columns - width + 1])
            top, left = integers(words(start[sample : sample + 1], PLACE, 2)[0], room)
            inputs[sample, 0, top : top + height, left : left + width] |= drawn.ink
            labels[sample, : len(tokens)] = [TOKEN_NUMBERS[token] for token in tokens]
            motifs[sample, : len(drawn.motifs)] = drawn.motifs + np.array([0, top, top, left, left])
        return MotifBatch(*(torch.from_numpy(array) for array in (inputs, labels, motifs)))

    def replacements(self, label: list[int], symbols: list[int]) -> list[Replacement]:
        """List digits and letters that occur once, as other digits and letters.

        Any formula may hold any of them.
        """
        possible = []
        for motif, symbol in enumerate(symbols):
            if SYMBOLS[symbol] not in formula_grammar.DIGITS_AND_LETTERS:
                continue
            token = TOKEN_NUMBERS[SYMBOLS[symbol]]
            if label.count(token) != 1:
                continue
            for other in formula_grammar.DIGITS_AND_LETTERS:
                if other != SYMBOLS[symbol]:
                    tokens = [
                        TOKEN_NUMBERS[other] if number == token else number for number in label
                    ]
                    possible.append(Replacement(motif, SYMBOLS.index(other), tokens))
        return possible

    def _formula(self, start: np.ndarray) -> tuple[tuple[str, ...], Picture]:
        """Draw the tokens of the sample that starts at ``start``, uint64 [1], and their picture.

        Raises:
            RuntimeError: none of 1000 formulas of its length fits the canvas.
        """
        length = 1 + int(integers(words(start, LENGTH, 1), self.longest)[0, 0])
        numbers = formula_grammar.numbers_of(length)
        for attempt in range(ATTEMPTS):
            random = fractions(words(start, FORMULA + attempt * numbers, numbers)[0])
            tokens = formula_grammar.formula(length, iter(random.tolist()))
            drawn = picture(tokens, self.font_pixels)
            if all(size <= room for size, room in zip(drawn.ink.shape, self.canvas, strict=True)):
                return tokens, drawn
        raise RuntimeError(
            f"LatexFormulas: none of {ATTEMPTS} formulas of {length} tokens fits the canvas: take "
            f"a larger canvas, fewer tokens or a smaller font, got {self}"
        )


TOKEN_NUMBERS = {token: number for number, token in enumerate(formula_grammar.TOKENS)}
