"""The figures of README and documentation as SVG: bars and dots of the committed rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from table import Line

from sparsekern.benchmarks.cases.topk import ITSELF
from sparsekern.benchmarks.figures import drawing, written

STEP = ("SparseAutoencoder", 1024, 768, 16384, 32)
STEP_PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")


class Strip(NamedTuple):
    """A row of dots: its name, a line below it, and the dots' values and classes."""

    name: str
    below: str
    dots: list[tuple[float, str]]


class Axis(NamedTuple):
    """Where values lie: place maps them to 0..1, ticks are values with their text."""

    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def strips(title: str, lines: Sequence[str], rows: Sequence[Strip], axis: Axis) -> str:
    """Draw rows of dots over one axis, with lines of explanation below the title."""
    left, right, step = 228, 456, 40
    top = 62 + 18 * len(lines)
    bottom = top + step * len(rows)

    def x_of(value: float) -> float:
        return left + (right - left) * axis.place(value)

    parts = [written(0, 18, title, "head")]
    parts += [written(0, 36 + 18 * at, line, "faint") for at, line in enumerate(lines)]
    for tick, text in axis.ticks:
        x = f"{x_of(tick):.1f}"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{top - 14}" y2="{bottom - 10}"/>')
        parts.append(written(round(x_of(tick), 1), top - 20, text, "faint", "middle"))
    for at, row in enumerate(rows):
        y = top + step * at
        parts.append(written(0, y, row.name))
        parts.append(written(0, y + 15, row.below, "faint"))
        for value, kind in row.dots:
            parts.append(f'<circle class="{kind}" cx="{x_of(value):.1f}" cy="{y}" r="5"/>')
    return drawing(bottom, title, parts)


def training_step(lines: Sequence[Line]) -> str:
    """Draw bars of the time of a training step, ours and the peers', in each precision."""
    op, rows, features, latents, k = STEP
    parts = [
        written(0, 18, "Training step of a sparse autoencoder", "head"),
        written(0, 38, f"{rows} tokens, {features} features, {latents} latents, k = {k};", "faint"),
        written(0, 54, "forward and backward, milliseconds: shorter is better", "faint"),
    ]
    y, left, right = 84, 140, 420
    for autocast, title in (("", "float32"), ("bfloat16", "bfloat16 autocast")):
        found = {
            line.target.peer: line.row
            for line in lines
            if line.row
            and line.target.peer in STEP_PEERS
            and line.target.workload.autocast == autocast
            and line.target.workload.op == op
        }
        ours = {row["median_ms"] for row in found.values()}
        if len(ours) != 1:
            raise ValueError(f"training_step: {title} must be measured in one loop, got {ours}")
        bars = [("sparsekern", ours.pop())]
        bars += [(peer, found[peer]["peer_median_ms"]) for peer in STEP_PEERS]
        longest = max(time for _, time in bars)
        parts.append(written(0, y, title, "head"))
        for name, time in bars:
            y += 26
            length = (right - left) * time / longest
            kind = "ours" if name == "sparsekern" else "other"
            parts.append(written(0, y, name))
            parts.append(
                f'<rect class="{kind}" x="{left}" y="{y - 14}" width="{length:.1f}" height="18"/>'
            )
            parts.append(written(round(left + length + 8, 1), y, f"{time:.0f}"))
        y += 40
    row = next(line.row for line in lines if line.row)
    parts.append(written(0, y - 8, f"{row['cpu']}, {row['threads']} threads", "faint"))
    return drawing(y, "Time of a training step: sparsekern and three libraries", parts)


def ratios(lines: Sequence[Line]) -> str:
    """Draw a dot for each line of the table, by operation and peer, on a logarithmic axis."""
    groups: dict[tuple[str, str], Strip] = {}
    for line in lines:
        if line.row and not line.row["refused"] and line.target.peer != ITSELF:
            work, peer = line.target.workload, line.target.peer
            extra = {"forward": "", "forward+backward": ", with gradient"}
            name = work.op + extra.get(work.mode, f", {work.mode}" * ("step" not in work.op))
            strip = groups.setdefault((name, peer), Strip(name, peer, []))
            strip.dots.append((line.row["ratio"], "ours"))
    low, high = math.log10(0.6), math.log10(200)
    axis = Axis(
        lambda ratio: (math.log10(ratio) - low) / (high - low),
        [(1, "1x"), (10, "10x"), (100, "100x")],
    )
    about = ["operation, and below it what it is compared with"]
    title = "Peer's time / our time, a dot for each case"
    return strips(title, about, list(groups.values()), axis)


SHARES = Axis(lambda share: share, [(0, "0 %"), (0.5, "50 %"), (1, "100 %")])


def dead_units(arms: Sequence[tuple[str, str, str]], cells: Sequence[dict[str, str]]) -> str:
    """Draw the share of dead units of each seed: (arm, its name, what it is) in order."""
    kinds = {"dsprites": "ours", "shapes3d": "other"}
    rows = [
        Strip(name, below, [
            (float(cell["dead_never"]), kinds[cell["dataset"]])
            for cell in cells if cell["arm"] == arm
        ])
        for arm, name, below in arms
    ]  # fmt: skip
    about = ["a dot for each seed; coloured: dSprites, grey: Shapes3D"]
    return strips("Units active on no test image, at the end", about, rows, SHARES)


def motif_errors(arms: Sequence[tuple[str, str, str]], cells: Sequence[dict[str, str]]) -> str:
    """Draw the sum of the three motif errors of each seed: (arm, its name, what it is)."""
    rows = [
        Strip(name, below, [
            (min(1.0, sum(float(cell[error]) for error in ("fpe", "fne", "ce"))),
             "ours" if arm == "sparling" else "other")
            for cell in cells if cell["arm"] == arm
        ])
        for arm, name, below in arms
    ]  # fmt: skip
    about = ["false positives, false negatives and confusion together;", "a dot for each seed"]
    return strips("Errors of the motifs found", about, rows, SHARES)
