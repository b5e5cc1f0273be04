"""Figures of the Sparling study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.motifs.domain import TEST_SEED, MotifDomain
from ...data.motifs.drawing import draw_motifs
from ...models.sparling import MotifModel
from ..figures import as_png, new_figure
from . import measures

SHOWN = 6
# Activations drawn in an input; a bottleneck that is not sparse has thousands.
MOST_SHOWN = 60
DOTS_PER_INCH = 110
ERRORS = {"fpe": "tab:red", "fne": "tab:orange", "ce": "tab:purple"}
NAMES = {"fpe": "false positive", "fne": "false negative", "ce": "confusion"}
DENSITY = "density of the activations, in multiples of the motifs'"
LEAST_PERCENT = 1e-2  # of a logarithmic axis; zero is drawn there


@torch.no_grad()
def found_motifs(
    model: MotifModel, domain: MotifDomain, assignment: Sequence[int], device: torch.device
) -> bytes:
    """Draw the first test inputs with their motifs and a model's activations: a PNG."""
    batch = domain.batch(TEST_SEED, 0, SHOWN)
    activations, _ = model.activations(measures.on_device(batch.inputs, device))
    columns = 3 if len(domain.space) == 2 and domain.space[0] == domain.space[1] else 1
    rows = SHOWN // columns
    figure = new_figure(9, 3.2 * rows if columns > 1 else 2.4 * rows, DOTS_PER_INCH)
    for sample, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        strongest = _strongest(activations[sample].cpu())
        draw_motifs(domain, batch, sample, axes, found=strongest, channel_symbols=assignment)
    return as_png(figure)


def _strongest(activations: Tensor) -> Tensor:
    """Find the largest activations of [C, *space]: channel and position, int64 [n, 1 + d].

    Those that are not zero, and at most MOST_SHOWN of them.
    """
    places = activations.nonzero()
    if len(places) > MOST_SHOWN:
        values = activations[tuple(places.unbind(1))].abs()
        places = places[values.topk(MOST_SHOWN).indices]
    return places


def annealing_path(runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw motif errors against density, and accuracy against samples: a PNG.

    Args:
        runs: epoch records of each seed.
    """
    figure = new_figure(9, 6.5, DOTS_PER_INCH)
    errors, course = figure.subplots(2, 1)
    for number, epochs in enumerate(runs.values()):
        for name, colour in ERRORS.items():
            points = [
                (epoch["relative_density"], max(100 * epoch[name], LEAST_PERCENT))
                for epoch in epochs
                if epoch[name] is not None and epoch["relative_density"] > 0
            ]
            label = NAMES[name] if number == 0 else None
            errors.plot(*zip(*points, strict=True), ".-", ms=3, lw=0.7, c=colour, label=label)
        samples = [(epoch["epoch"] + 1) * epoch["samples"] / 1000 for epoch in epochs]
        course.plot(samples, [100 * epoch["accuracy"] for epoch in epochs], c="tab:blue", lw=0.8)
    errors.set(
        xscale="log", yscale="log", xlabel=DENSITY,
        ylabel="error (%)", ylim=(LEAST_PERCENT, 120),
    )  # fmt: skip
    errors.invert_xaxis()
    errors.legend(fontsize=8)
    course.set(xlabel="training samples (thousands)", ylabel="exact labels,\nvalidation (%)")
    course.set_ylim(0, 102)
    for axes in (errors, course):
        axes.grid(alpha=0.3)
    return as_png(figure)


def sweep(rows: Sequence[tuple[str, float, float]]) -> bytes:
    """Draw the total motif error against the density of each run: a PNG.

    Args:
        rows: kind, relative density and total error in percent of each.
    """
    figure = new_figure(9, 4, DOTS_PER_INCH)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for kind, _, _ in rows))
    for kind in kinds:
        points = [(d, t) for k, d, t in rows if k == kind and d > 0 and not math.isnan(t)]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, label=kind)
    axes.set(
        xscale="log", yscale="log", xlabel=DENSITY,
        ylabel="FPE + FNE + CE (%)",
    )  # fmt: skip
    axes.axhline(10, color="0.5", lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return as_png(figure)
