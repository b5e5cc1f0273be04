"""The figures on active units and on deaths against the epoch, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...figures import from_zero
from . import figures
from .activity import PHASES, binding, phase_of_units, scheduled_epochs
from .figures import BLUE, ORANGE, SETS, STUDY_AND_CONTROLS, named
from .summary import Content, Measured

PHASE_COLOURS = dict(zip(PHASES, ("#9A9A9A", ORANGE, BLUE), strict=True))


def active_units(measured: Measured) -> bytes:
    """Draw L0 and k after each epoch, and below, where L1 was run and wrote it, its strength."""
    steered = any("strength" in r for c in measured.cells.values() for r in c["epochs"])
    figure, panels = figures.new_figure(
        5.2 if steered else 3.2, 2 if steered else 1, len(measured.datasets),
        sharex="col", sharey="row",
    )  # fmt: skip
    for at, dataset in enumerate(measured.datasets):
        _l0_panel(panels[0, at], measured, dataset)
        if steered:
            _strength_panel(panels[1, at], measured, dataset)
        panels[-1, at].set_xlabel("epoch")
        for panel in panels[:, at]:
            figures.plain(panel)
    panels[0, 0].set_ylabel("active units per image", fontsize=9)
    if steered:
        panels[1, 0].set_ylabel("strength of L1", fontsize=9)
    figures.legend_below(figure, panels, 5)
    return figures.as_png(figure)


def _l0_panel(panel: Any, measured: Measured, dataset: str) -> None:
    """Draw L0 and k of a data set."""
    for arm in STUDY_AND_CONTROLS:
        contents = list(measured.of(dataset, arm).values())
        if not contents:
            continue
        records = contents[0]["epochs"]
        x = range(1, len(records) + 1)
        if arm in ("topk", "l1"):
            panel.plot(
                x, [r["k"] for r in records], color="black", linestyle="--", linewidth=1, label="k"
            )
        runs = [[r["eval_l0"] for r in c["epochs"]] for c in contents]
        figures.band(panel, arm, x, runs, (0, None))
        if contents[0]["config"]["extra_epochs"]:
            figures.mark_end(panel, contents[0]["config"]["epochs"])
    panel.set_title(SETS[dataset])
    from_zero(panel)
    panel.xaxis.get_major_locator().set_params(integer=True)


def _strength_panel(panel: Any, measured: Measured, dataset: str) -> None:
    """Draw the strength of L1 of a data set."""
    contents = list(measured.of(dataset, "l1").values())
    runs = [[r.get("strength", np.nan) for r in c["epochs"]] for c in contents]
    for run in runs:
        panel.plot(range(1, len(run) + 1), run, color=figures.COLOURS["l1"], linewidth=1)
    if contents and contents[0]["config"]["extra_epochs"]:
        panel.axvline(contents[0]["config"]["epochs"], color="black", linestyle=":", linewidth=1)
    panel.set_yscale("log")


def deaths(measured: Measured) -> bytes:
    """Draw how many units fell silent in which epoch, by phase.

    For the rest of the schedule; k at that epoch is on the axis above.
    """
    arms = [arm for arm in STUDY_AND_CONTROLS if arm in measured.arms]
    figure, panels = figures.new_figure(0.6 + 1.9 * len(arms), len(arms), len(measured.datasets))
    for row, arm in zip(panels, arms, strict=True):
        for panel, dataset in zip(row, measured.datasets, strict=True):
            contents = list(measured.of(dataset, arm).values())
            if contents:
                _death_panel(panel, contents)
            else:
                panel.text(0.5, 0.5, "not run", ha="center", transform=panel.transAxes, fontsize=8)
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
            panel.set_title(f"{SETS[dataset]}, {named(arm)}", fontsize=9)
        row[0].set_ylabel("units", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("first epoch without activity", fontsize=8)
    figures.legend_below(figure, panels)
    return figures.as_png(figure)


def _death_panel(panel: Any, contents: Sequence[Content]) -> None:
    """Draw the deaths of an arm."""
    records = scheduled_epochs(contents[0])
    width = max(1, -(-len(records) // 50))
    edges = np.arange(0.5, len(records) + width + 0.5, width)
    total = np.zeros(len(edges) - 1)
    for phase in PHASES:
        epochs = [
            last + 2
            for content in contents
            for last, found in zip(
                content["results"]["death_epoch"], phase_of_units(content), strict=True
            )
            if found == phase and last is not None
        ]
        counts = np.histogram(epochs, edges)[0] / len(contents)
        panel.bar(
            edges[:-1], counts, width, bottom=total, align="edge", label=phase,
            color=PHASE_COLOURS[phase], edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        total += counts
    figures.plain(panel)
    panel.set_xlim(edges[0], edges[-1])
    panel.set_ylim(0, max(1.0, 1.1 * total.max()))
    if not total.any():
        panel.set_yticks([0])
        panel.text(0.5, 0.5, "no dead units", ha="center", transform=panel.transAxes, fontsize=8)
    began = {at for at in map(binding, contents) if at is not None}
    for at in began:
        panel.axvline(at + 0.5, color="black", linestyle=":", linewidth=1)
    end = len(records)
    ticks = sorted({at for at in (1, end // 4, end // 2, 3 * end // 4, end) if at > 0})
    panel.set_xticks(ticks)
    above = panel.secondary_xaxis("top")
    above.set_xticks(ticks, [f"k={records[at - 1]['k']}" for at in ticks], fontsize=7)
    above.tick_params(length=2, pad=1)
    above.spines["top"].set_visible(False)
