"""Pictures of inputs with their motifs, and of what a model found in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._system import require
from .domain import NONE, MotifBatch, MotifDomain

DOTS_PER_INCH = 120
INCHES, TITLE_INCHES = 8.0, 0.3  # width, and what a picture needs besides the input
MOST_INCHES = 8.0  # of the height
SOUND_INCHES = 2.5  # height of a spectrogram
BEHIND_TEXT = {
    "boxstyle": "square,pad=0.1",
    "facecolor": "white",
    "edgecolor": "none",
    "alpha": 0.8,
}
TRUE, CORRECT, WRONG, MISSED = "tab:blue", "tab:green", "tab:red", "tab:orange"


def draw_motifs(
    domain: MotifDomain,
    batch: MotifBatch,
    sample: int,
    target: Any,
    *,
    found: Tensor | None = None,
    channel_symbols: Sequence[int] | None = None,
) -> None:
    """Draw an input with its true motifs boxed and named, and what was found in it.

    Without ``found`` the boxes are blue. With it, a motif's box is green when an activation that
    means its symbol lies in its region (the box, widened by the domain's margin), else orange;
    an activation is a green cross when it lies in the region of a motif whose symbol it means,
    else a red one with the symbol's name.

    Args:
        domain: what the batch is from.
        batch: of the domain; only one of its samples is drawn.
        sample: which one.
        target: matplotlib axes to draw into, or the path of a new picture.
        found: activations int64 ``[n, 1 + d]``: channel, and position along each dimension.
        channel_symbols: the symbol that each channel means, an index into ``domain.symbols`` or -1
            for none; needed with ``found``.

    Raises:
        ValueError: sample is out of range, or there are activations but no channel_symbols.
    """
    if not 0 <= sample < len(batch.labels):
        raise ValueError(
            f"draw_motifs: sample must lie in 0..{len(batch.labels) - 1} (the samples of the "
            f"batch), got {sample}"
        )
    if found is not None and channel_symbols is None:
        raise ValueError("draw_motifs: channel_symbols must be given with found, got None")
    if isinstance(target, str | Path):
        figure, axes = _figure(domain)
        draw_motifs(domain, batch, sample, axes, found=found, channel_symbols=channel_symbols)
        figure.savefig(target)
        return
    motifs = batch.motifs[sample].numpy()
    motifs = _as_planar(motifs[motifs[:, 0] != NONE], domain)
    _draw_input(domain, batch.inputs[sample], target)
    target.set_title(_label(domain, batch.labels[sample]), fontsize=9)
    if found is None or channel_symbols is None:
        _draw_boxes(domain, motifs, [TRUE] * len(motifs), target)
        return
    points = _as_points(found.cpu().numpy(), np.asarray(channel_symbols), domain)
    matches = _matches(points, motifs, domain.margin)
    colors = [CORRECT if hit else MISSED for hit in np.any(matches, axis=0).tolist()]
    _draw_boxes(domain, motifs, colors, target)
    _draw_points(domain, points, np.any(matches, axis=1).tolist(), target)


def _figure(domain: MotifDomain) -> tuple[Any, Any]:
    """Make a figure of the input's proportions and its axes, without a display."""
    if len(domain.space) == 1:
        size = INCHES, SOUND_INCHES + TITLE_INCHES
    else:
        rows, columns = domain.space
        width = min(INCHES, MOST_INCHES * columns / rows)
        size = width, width * rows / columns + TITLE_INCHES
    figure = require("matplotlib.figure", "drawing motifs").Figure(
        size, dpi=DOTS_PER_INCH, layout="constrained"
    )
    return figure, figure.subplots()


def _label(domain: MotifDomain, label: Tensor) -> str:
    """Write out a label int64 [L]."""
    # A dollar sign would switch matplotlib to formulas; there is none among the symbols.
    return "".join(domain.label_symbols[number] for number in label.tolist() if number != NONE)


def _as_planar(motifs: np.ndarray, domain: MotifDomain) -> np.ndarray:
    """Place motifs int64 [n, 5] as on an image: those of sound reach over all channels."""
    if len(domain.space) == 2:
        return motifs
    symbols, spans = motifs[:, :1], motifs[:, 1:]
    rows = np.broadcast_to([0, domain.in_channels], spans.shape)
    return np.concatenate([symbols, rows, spans], 1)


def _as_points(activations: np.ndarray, meanings: np.ndarray, domain: MotifDomain) -> np.ndarray:
    """Place activations int64 [n, 3] (symbol, row, column); those of sound in the middle row."""
    symbols = meanings[activations[:, 0]][:, None]
    if len(domain.space) == 2:
        return np.concatenate([symbols, activations[:, 1:]], 1)
    rows = np.full_like(symbols, domain.in_channels // 2)
    return np.concatenate([symbols, rows, activations[:, 1:]], 1)


def _matches(points: np.ndarray, motifs: np.ndarray, margin: int) -> np.ndarray:
    """Tell whether each activation [p, 3] lies in the region of each motif [m, 5] and means it."""
    starts, stops = motifs[:, 1::2] - margin, motifs[:, 2::2] + margin
    places = points[:, None, 1:]
    inside = ((places >= starts) & (places < stops)).all(-1)
    same_symbol: np.ndarray = points[:, None, 0] == motifs[:, 0]
    return inside & same_symbol


def _draw_input(domain: MotifDomain, values: Tensor, axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if len(domain.space) == 2:
        axes.imshow(values[0].numpy(), cmap="gray_r", interpolation="nearest", alpha=0.4)
    else:
        axes.imshow(values.numpy(), cmap="gray_r", aspect="auto", origin="lower")


def _draw_boxes(domain: MotifDomain, motifs: np.ndarray, colors: Sequence[str], axes: Any) -> None:
    rectangle = require("matplotlib.patches", "drawing motifs").Rectangle
    for (symbol, top, bottom, left, right), color in zip(motifs.tolist(), colors, strict=True):
        # Pixel i reaches from i - 0.5 to i + 0.5.
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axes.add_patch(rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1))
        axes.annotate(
            domain.symbols[symbol], corner, (0, 1), textcoords="offset points", color=color,
            fontsize=7, ha="left", va="bottom", annotation_clip=False, bbox=BEHIND_TEXT,
        )  # fmt: skip


def _draw_points(
    domain: MotifDomain, points: np.ndarray, correct: Sequence[bool], axes: Any
) -> None:
    for (symbol, row, column), right in zip(points.tolist(), correct, strict=True):
        color = CORRECT if right else WRONG
        axes.plot(column, row, marker="x", color=color, markersize=5, markeredgewidth=1.5)
        if not right:
            name = domain.symbols[symbol] if symbol != NONE else "?"
            axes.annotate(
                name, (column, row), (4, 0), textcoords="offset points", color=color, fontsize=7,
                ha="left", va="center", bbox=BEHIND_TEXT,
            )  # fmt: skip
