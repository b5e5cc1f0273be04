"""Binary pictures of formulas in Computer Modern, with the box of every character and bar.

matplotlib's mathtext lays a formula out, through its public
:meth:`matplotlib.textpath.TextToPath.get_glyphs_mathtext`, which also gives the outline of each
glyph. The pixels are ours: a glyph is drawn once per size, and put where the layout says, rounded
to whole pixels. So all copies of a character at one size look the same, and a picture is exactly
the union of its motifs.

A pixel is ink when at least a quarter of it is covered: a grey picture, white 1 and black 0,
binarised at 0.75.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..._system import require
from .formula_grammar import CHARACTERS

SYMBOLS = (*CHARACTERS, "\\frac")  # the last one is the fraction bar
BAR = SYMBOLS.index("\\frac")
POINTS_PER_INCH = 72
SAMPLES = 8  # per side of a pixel, for its covered share
INK = 0.25  # of a pixel


class Picture(NamedTuple):
    """A formula's ink, cropped.

    Attributes:
        ink: uint8 ``[height, width]`` of 0 and 1.
        motifs: int64 ``[n, 5]``: index into :data:`SYMBOLS`, first and one past the last row,
            first and one past the last column of its ink, in the order of the layout.
    """

    ink: np.ndarray
    motifs: np.ndarray


class _Stamp(NamedTuple):
    """Ink of a glyph, and where its upper left pixel is from the glyph's origin."""

    ink: np.ndarray
    row: int
    column: int


def picture(tokens: tuple[str, ...], pixels: float) -> Picture:
    """Draw a formula.

    Args:
        tokens: of :mod:`.formula_grammar`, not empty.
        pixels: font size in pixels, the height of a line of type.

    Raises:
        ValueError: mathtext cannot read the tokens.
        ModuleNotFoundError: matplotlib is not installed.
    """
    placed: list[tuple[int, _Stamp, int, int]] = []
    layout = _layout("".join(tokens))
    for name, x, y, size in layout.glyphs:
        stamp = _stamp(name, round(size * pixels, 6))
        placed.append((_symbol_names()[name], stamp, -round(y * pixels), round(x * pixels)))
    for x, y, width, height in layout.bars:
        ink = np.ones((max(1, round(height * pixels)), max(1, round(width * pixels))), np.uint8)
        # y is the lower edge, and up; rows go down.
        placed.append((BAR, _Stamp(ink, -len(ink), 0), -round(y * pixels), round(x * pixels)))
    return _compose(placed)


def _compose(placed: list[tuple[int, _Stamp, int, int]]) -> Picture:
    """Join stamps, each with its symbol and the row and column of its origin, to a picture."""
    motifs = np.array(
        [
            (symbol, top, top + len(stamp.ink), left, left + stamp.ink.shape[1])
            for symbol, stamp, row, column in placed
            for top, left in [(row + stamp.row, column + stamp.column)]
        ]
    )
    motifs[:, 1:3] -= motifs[:, 1].min()
    motifs[:, 3:] -= motifs[:, 3].min()
    ink = np.zeros((motifs[:, 2].max(), motifs[:, 4].max()), np.uint8)
    for (_, stamp, _, _), (_, top, bottom, left, right) in zip(placed, motifs, strict=True):
        ink[top:bottom, left:right] |= stamp.ink
    return Picture(ink, motifs)


class _Layout(NamedTuple):
    """Where mathtext puts things at a font size of 1, x to the right and y up.

    Attributes:
        glyphs: name, x, y of the origin, and size of each.
        bars: x, y, width and height of each.
    """

    glyphs: list[tuple[str, float, float, float]]
    bars: list[tuple[float, float, float, float]]


@cache
def _text_to_path() -> tuple[Any, Any, dict[str, Any]]:
    """Load matplotlib's layout, the font, and the outlines of the glyphs seen so far."""
    purpose = "drawing formulas"
    layout = require("matplotlib.textpath", purpose).TextToPath()
    fonts = require("matplotlib.font_manager", purpose)
    # An empty dictionary would not be filled: the outline of any glyph starts it.
    font = fonts.FontProperties(math_fontfamily="cm")
    return layout, font, layout.get_glyphs_mathtext(font, "$0$")[1]


def _layout(text: str) -> _Layout:
    """Lay out a formula in mathtext's language."""
    layout, font, outlines = _text_to_path()
    glyphs, _, rectangles = layout.get_glyphs_mathtext(font, f"${text}$", glyph_map=outlines)
    unit = layout.FONT_SCALE
    bars = []
    for (start, _, opposite, *_), _ in rectangles:
        width, height = opposite[0] - start[0], opposite[1] - start[1]
        bars.append((start[0] / unit, start[1] / unit, width / unit, height / unit))
    return _Layout([(name, x / unit, y / unit, size) for name, x, y, size in glyphs], bars)


@cache
def _symbol_names() -> dict[str, int]:
    """Find the symbol of each of mathtext's names of glyphs."""
    return {_layout(symbol).glyphs[0][0]: number for number, symbol in enumerate(CHARACTERS)}


@cache
def _stamp(name: str, pixels: float) -> _Stamp:
    """Draw a glyph at a font size in pixels."""
    layout, _, outlines = _text_to_path()
    paths = require("matplotlib.path", "drawing formulas")
    vertices, codes = outlines[name]
    scale = pixels / layout.FONT_SCALE
    contours = [scale * contour for contour in paths.Path(vertices, codes).to_polygons()]
    # Whole pixels around the outline, y up.
    x0, y0 = np.floor(np.min([contour.min(0) for contour in contours], 0)).astype(int)
    x1, y1 = np.ceil(np.max([contour.max(0) for contour in contours], 0)).astype(int)
    x = x0 + (np.arange((x1 - x0) * SAMPLES) + 0.5) / SAMPLES
    y = y1 - (np.arange((y1 - y0) * SAMPLES) + 0.5) / SAMPLES
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    inside = np.zeros(len(points), bool)
    for contour in contours:  # a contour within another is a hole
        inside ^= paths.Path(contour).contains_points(points)
    covered = inside.reshape(y1 - y0, SAMPLES, x1 - x0, SAMPLES).mean((1, 3))
    # Some characters of the smallest sizes cover a quarter of no pixel: those get their best.
    ink = covered >= min(INK, covered.max())
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _Stamp(ink.astype(np.uint8), int(rows[0] - y1), int(columns[0] + x0))
