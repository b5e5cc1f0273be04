"""Figures of a run, drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._system import require
from ..training.runs import write_atomically

DOTS_PER_INCH = 120


def new_figure(width: float, height: float, dots_per_inch: int = DOTS_PER_INCH) -> Any:
    """Make a figure of this size in inches."""
    # The object interface: pyplot would pick a window system and keep global state.
    figure = require("matplotlib.figure", "drawing figures")
    return figure.Figure(figsize=(width, height), dpi=dots_per_inch, layout="constrained")


def as_png(figure: Any) -> bytes:
    """Encode a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def from_zero(panel: Any) -> None:
    """Let the vertical axis run from 0 to well above what is drawn.

    The frame would hide what is nearly level there.
    """
    top = float(panel.dataLim.ymax)
    panel.set_ylim(0, 1.15 * top if 0 < top < math.inf else 1.0)


def save_history(path: Path, epochs: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write a PNG of loss, k and dead share over the epochs, one panel above the other.

    Args:
        path: the PNG.
        epochs: logged epoch records with reconstruction, eval_reconstruction, k, eval_l0, eval_dead
            and train_dead.
        title: above the panels.
    """
    figure = new_figure(7, 8)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(3, 1, sharex=True)
    number = [record["epoch"] + 1 for record in epochs]

    def line(panel: Any, key: str, label: str, scale: float = 1.0, **style: Any) -> None:
        panel.plot(number, [scale * record[key] for record in epochs], label=label, **style)

    line(panels[0], "reconstruction", "training images, z sampled")
    line(panels[0], "eval_reconstruction", "held-out images, z = mean")
    panels[0].set(ylabel="reconstruction loss\n(nats per image)", yscale="log")
    line(panels[1], "k", "k (units kept)")
    line(panels[1], "eval_l0", "L0 (units not zero)", linestyle="--")
    panels[1].set(ylabel="active units")
    from_zero(panels[1])
    line(panels[2], "eval_dead", "never active on the held-out images, z = mean", scale=100)
    line(panels[2], "train_dead", "not active for an epoch of training, z sampled", scale=100)
    panels[2].set(ylabel="dead units (%)", xlabel="epoch", ylim=(-2, 102))
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    write_atomically(path, as_png(figure))


def save_sae_history(path: Path, steps: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    """Write a PNG of FVU, active and dead latents over the tokens of training.

    Args:
        path: the PNG.
        steps: logged step records with step, fvu, l0, dead and, where the activation has one, k.
        batch_size: tokens of a step.
    """
    figure = new_figure(7, 7)
    panels = figure.subplots(3, 1, sharex=True)
    tokens = [record["step"] * batch_size for record in steps]

    def line(panel: Any, key: str, label: str, scale: float = 1.0, **style: Any) -> None:
        panel.plot(tokens, [scale * record[key] for record in steps], label=label, **style)

    line(panels[0], "fvu", "fraction of variance unexplained")
    panels[0].set(ylabel="FVU", yscale="log")
    if steps and "k" in steps[0]:
        line(panels[1], "k", "k (latents kept)")
    line(panels[1], "l0", "L0 (latents not zero)", linestyle="--")
    panels[1].set(ylabel="active latents")
    line(panels[2], "dead", "dead latents", scale=100)
    from_zero(panels[1])
    panels[2].set(ylabel="dead latents (%)", xlabel="tokens", ylim=(-2, 102))
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    write_atomically(path, as_png(figure))


def save_reconstructions(
    path: Path, images: np.ndarray, reconstructions: np.ndarray, title: str
) -> None:
    """Write a PNG of inputs in one row and their reconstructions in the row below.

    Args:
        path: the PNG.
        images: [n, height, width] in 0..1.
        reconstructions: [n, height, width] in 0..1.
        title: above the rows.
    """
    count = len(images)
    figure = new_figure(1.0 * count, 2.6)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, count, squeeze=False)
    for row, (label, pictures) in enumerate((("input", images), ("output", reconstructions))):
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(label)
    write_atomically(path, as_png(figure))
