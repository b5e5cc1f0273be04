"""The figures of a report, as PNG bytes, drawn without a display: one panel for each data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...figures import as_png, from_zero
from ...figures import new_figure as sized_figure
from ..grid import ARMS, STUDY
from .activity import PHASES, first_cut_epoch, phase_of_units, scheduled_epochs
from .measurements import (
    UNCURED,
    Content,
    Measured,
    alive_selectivity,
    at_end_of_schedule,
    draws_matter,
    mig_score,
    never_active,
    never_active_drawn,
    random_mig,
    records_by_k,
    untrained_mig,
)
from .names import SETS, STUDY_AND_CONTROLS, definition, named
from .statistics import CURED_BELOW, spread

DOTS_PER_INCH = 150
WIDTH = 7.0
# Okabe and Ito's colours, which differ for colour-blind readers, too.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#6B6B6B"
OTHERS = (GREEN, ORANGE, SKY, PURPLE, VERMILION, "#8C6D1F", "#332288")
MARKERS = "sD^vPX*hp<>"
COLOURS = {"topk": BLUE, "l1": VERMILION, "dense": GREY, "fixed": GREEN}
MARKS = {"topk": "o", "l1": "o", "dense": "o", "fixed": "o"}
PHASE_COLOURS = dict(zip(PHASES, ("#9A9A9A", ORANGE, BLUE), strict=True))
# Cures first: they share a figure.
_others = sorted(set(ARMS) - set(COLOURS), key=lambda arm: (ARMS[arm].group, list(ARMS).index(arm)))
for _at, _arm in enumerate(_others):
    COLOURS[_arm] = OTHERS[_at % len(OTHERS)]
    MARKS[_arm] = MARKERS[_at % len(MARKERS)]


# -- style -----------------------------------------------------------------------------------------


def new_figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """Make a figure of a report's width and this height in inches, with panels [rows, columns]."""
    figure = sized_figure(WIDTH, height, DOTS_PER_INCH)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend_below(figure: Any, panels: Any, columns: int = 4) -> None:
    """Draw one legend for all panels."""
    entries: dict[str, Any] = {}
    for panel in np.ravel(panels):
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=columns,
            fontsize=8, frameon=False,
        )  # fmt: skip


def plain(panel: Any) -> None:
    """Give a panel the style of all: a light grid, two spines, small labels."""
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.title.set_fontsize(10)
    panel.xaxis.label.set_fontsize(9)
    panel.yaxis.label.set_fontsize(9)


def band(
    panel: Any,
    arm: str,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    limits: tuple[float, float | None] = (0, 100),
) -> None:
    """Draw the mean of runs with a band of one standard deviation, within limits."""
    values = np.array(runs, dtype=float)
    mean = values.mean(0)
    panel.plot(x, mean, color=COLOURS[arm], label=named(arm), linewidth=1.6)
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        low, high = np.clip(mean - sd, *limits), np.clip(mean + sd, *limits)
        panel.fill_between(x, low, high, color=COLOURS[arm], alpha=0.2, linewidth=0)


def mark_end(panel: Any, epoch: int) -> None:
    """Draw a line where the schedule ends."""
    panel.axvline(epoch, color="black", linestyle=":", linewidth=1)
    panel.annotate(
        "end of schedule", (epoch, 1), xycoords=("data", "axes fraction"), fontsize=7,
        xytext=(3, -2), textcoords="offset points", va="top",
    )  # fmt: skip


# -- against the epoch -----------------------------------------------------------------------------


def dead_by_epoch(measured: Measured) -> bytes:
    """Draw the units never active on the held-out images after each epoch."""
    figure, panels = new_figure(3.4, 1, len(measured.datasets), sharey=True)
    for panel, dataset in zip(panels[0], measured.datasets, strict=True):
        ends = set()
        for arm in STUDY_AND_CONTROLS:
            contents = list(measured.of(dataset, arm).values())
            if contents:
                runs = [
                    [100 * record["eval_dead"] for record in content["epochs"]]
                    for content in contents
                ]
                band(panel, arm, range(1, len(runs[0]) + 1), runs)
                if contents[0]["config"]["extra_epochs"]:
                    ends.add(contents[0]["config"]["epochs"])
        for end in ends:
            mark_end(panel, end)
        panel.set(title=SETS[dataset], xlabel="epoch", ylim=(-2, 102))
        panel.xaxis.get_major_locator().set_params(integer=True)
        plain(panel)
    panels[0, 0].set_ylabel("never active units (%)", fontsize=9)
    legend_below(figure, panels)
    return as_png(figure)


def active_units(measured: Measured) -> bytes:
    """Draw L0 and k after each epoch, and below, where L1 was run and wrote it, its strength."""
    steered = any(
        "strength" in record for content in measured.cells.values() for record in content["epochs"]
    )
    figure, panels = new_figure(
        5.2 if steered else 3.2, 2 if steered else 1, len(measured.datasets),
        sharex="col", sharey="row",
    )  # fmt: skip
    for at, dataset in enumerate(measured.datasets):
        _l0_panel(panels[0, at], measured, dataset)
        if steered:
            _strength_panel(panels[1, at], measured, dataset)
        panels[-1, at].set_xlabel("epoch")
        for panel in panels[:, at]:
            plain(panel)
    panels[0, 0].set_ylabel("active units per image", fontsize=9)
    if steered:
        panels[1, 0].set_ylabel("strength of L1", fontsize=9)
    legend_below(figure, panels, 5)
    return as_png(figure)


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
                x,
                [record["k"] for record in records],
                color="black",
                linestyle="--",
                linewidth=1,
                label="k",
            )
        runs = [[record["eval_l0"] for record in content["epochs"]] for content in contents]
        band(panel, arm, x, runs, (0, None))
        if contents[0]["config"]["extra_epochs"]:
            mark_end(panel, contents[0]["config"]["epochs"])
    panel.set_title(SETS[dataset])
    from_zero(panel)
    panel.xaxis.get_major_locator().set_params(integer=True)


def _strength_panel(panel: Any, measured: Measured, dataset: str) -> None:
    """Draw the strength of L1 of a data set."""
    contents = list(measured.of(dataset, "l1").values())
    runs = [
        [record.get("strength", np.nan) for record in content["epochs"]] for content in contents
    ]
    for run in runs:
        panel.plot(range(1, len(run) + 1), run, color=COLOURS["l1"], linewidth=1)
    if contents and contents[0]["config"]["extra_epochs"]:
        panel.axvline(contents[0]["config"]["epochs"], color="black", linestyle=":", linewidth=1)
    panel.set_yscale("log")


def deaths(measured: Measured) -> bytes:
    """Draw how many units fell silent in which epoch, by phase.

    For the rest of the schedule; k at that epoch is on the axis above.
    """
    arms = [arm for arm in STUDY_AND_CONTROLS if arm in measured.arms]
    figure, panels = new_figure(0.6 + 1.9 * len(arms), len(arms), len(measured.datasets))
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
    legend_below(figure, panels)
    return as_png(figure)


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
            for last, unit_phase in zip(
                content["results"]["death_epoch"], phase_of_units(content), strict=True
            )
            if unit_phase == phase and last is not None
        ]
        counts = np.histogram(epochs, edges)[0] / len(contents)
        panel.bar(
            edges[:-1], counts, width, bottom=total, align="edge", label=phase,
            color=PHASE_COLOURS[phase], edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        total += counts
    plain(panel)
    panel.set_xlim(edges[0], edges[-1])
    panel.set_ylim(0, max(1.0, 1.1 * total.max()))
    if not total.any():
        panel.set_yticks([0])
        panel.text(0.5, 0.5, "no dead units", ha="center", transform=panel.transAxes, fontsize=8)
    began = {at for at in map(first_cut_epoch, contents) if at is not None}
    for at in began:
        panel.axvline(at + 0.5, color="black", linestyle=":", linewidth=1)
    end = len(records)
    ticks = sorted({at for at in (1, end // 4, end // 2, 3 * end // 4, end) if at > 0})
    panel.set_xticks(ticks)
    above = panel.secondary_xaxis("top")
    above.set_xticks(ticks, [f"k={records[at - 1]['k']}" for at in ticks], fontsize=7)
    above.tick_params(length=2, pad=1)
    above.spines["top"].set_visible(False)


# -- against k -------------------------------------------------------------------------------------


def _shared_k_records(
    measured: Measured, dataset: str, arm: str, name: str
) -> tuple[list[int], list[list[Mapping[str, Any]]]]:
    """Find the k that all seeds went through, and for each seed its records at them."""
    runs = [records_by_k(content, name) for content in measured.of(dataset, arm).values()]
    shared = sorted(set(runs[0]).intersection(*runs)) if runs else []
    return shared, [[run[k] for k in shared] for run in runs]


def dead_by_k(measured: Measured) -> bytes:
    """Draw the units never active on the held-out images against k, during the schedule."""
    figure, panels = new_figure(3.4, 1, len(measured.datasets), sharey=True)
    for panel, dataset in zip(panels[0], measured.datasets, strict=True):
        for arm in STUDY:
            ks, runs = _shared_k_records(measured, dataset, arm, "eval_dead")
            if ks:
                band(
                    panel, arm, ks, [[100 * record["eval_dead"] for record in run] for run in runs]
                )
        for arm, style in (("dense", "--"), ("fixed", ":")):
            contents = measured.of(dataset, arm).values()
            if contents:
                value = spread(
                    content["epochs"][content["config"]["epochs"] - 1]["eval_dead"]
                    for content in contents
                )
                panel.axhline(
                    100 * value.mean, color=COLOURS[arm], linestyle=style, linewidth=1.4,
                    label=f"{named(arm)}, last epoch",
                )  # fmt: skip
        panel.set(title=SETS[dataset], xlabel="k (units kept, falls to the right)", ylim=(-2, 102))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.invert_xaxis()
        plain(panel)
    panels[0, 0].set_ylabel("never active units (%)", fontsize=9)
    legend_below(figure, panels)
    return as_png(figure)


def mig_by_k(measured: Measured) -> bytes:
    """Draw MIG of the mean code during the schedule, with the levels of controls."""
    figure, panels = new_figure(3.6, 1, len(measured.datasets))
    for panel, dataset in zip(panels[0], measured.datasets, strict=True):
        for arm in STUDY:
            ks, runs = _shared_k_records(measured, dataset, arm, "mig")
            if ks:
                values, low, high = (
                    np.array([[record[name] for record in run] for run in runs])
                    for name in ("mig", "mig_low", "mig_high")
                )
                panel.plot(
                    ks, values.mean(0), color=COLOURS[arm], marker="o", ms=3, linewidth=1.8,
                    label=named(arm),
                )  # fmt: skip
                # No error bars: an interval of a bootstrap need not hold the estimate.
                panel.vlines(ks, low.mean(0), high.mean(0), color=COLOURS[arm], linewidth=1)
                if len(values) > 1:
                    panel.plot(ks, values.T, color=COLOURS[arm], linewidth=0.8, alpha=0.5)
        for label, colour, style, of, get in _control_levels():
            value = measured.spread(dataset, of or first_arm(measured, dataset), get)
            if value is not None:
                panel.axhline(value.mean, color=colour, linestyle=style, linewidth=1.2, label=label)
        panel.set(title=SETS[dataset], xlabel="k (units kept, falls to the right)")
        from_zero(panel)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.invert_xaxis()
        plain(panel)
    panels[0, 0].set_ylabel("MIG of the mean code (0 to 1)", fontsize=9)
    legend_below(figure, panels, 5)
    return as_png(figure)


def _control_levels() -> list[tuple[str, str, str, str | None, Callable[[Content], float]]]:
    """List the levels of controls: label, colour, style, arm and getter."""
    return [
        ("dense, last epoch", GREY, "--", "dense", mig_score),
        ("untrained", "black", "-.", None, untrained_mig),
        ("random code", "black", ":", None, random_mig),
    ]


# -- at the end of the schedule --------------------------------------------------------------------


def panel_map(measured: Measured, dataset: str) -> bytes:
    """Draw the dead share of each arm under each definition, as a heat map."""
    arms = [arm for arm in measured.arms if measured.has(dataset, arm)]
    shares = [measured.panel(dataset, arm) for arm in arms]
    rows = [[share_by_name[n].mean for n in shares[0]] for share_by_name in shares]
    labels = [definition(n).replace(" ", "\n", 1) for n in shares[0]]
    if draws_matter(measured):
        for row, arm in zip(rows, arms, strict=True):
            row.append(measured.known(dataset, arm, never_active_drawn).mean)
        labels.append("never,\nz drawn")
    values = np.array(rows)
    figure, panels = new_figure(1.3 + 0.27 * len(arms), 1, 1)
    panel = panels[0, 0]
    shown = panel.imshow(100 * values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    panel.set_xticks(range(len(labels)), labels, fontsize=7.5)
    panel.set_yticks(range(len(arms)), [named(arm) for arm in arms], fontsize=8)
    panel.tick_params(length=0)
    for (row, column), value in np.ndenumerate(100 * values):
        colour = "black" if value > 55 else "white"
        panel.text(
            column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7.5
        )
    figure.colorbar(shown, ax=panel, pad=0.01).set_label("dead units (%)", fontsize=9)
    panel.set_title(SETS[dataset], fontsize=10)
    return as_png(figure)


def selectivity(measured: Measured) -> bytes:
    """Draw the distribution of the selectivity of living units, before and after."""
    figure, panels = new_figure(3.5, 1, len(measured.datasets), sharey=True)
    for panel, dataset in zip(panels[0], measured.datasets, strict=True):
        for label, colour, style, units in unit_sets(measured, dataset):
            values = np.sort([value for unit in units for value in alive_selectivity(unit)])
            if len(values):
                height = 100 * np.arange(1, len(values) + 1) / len(values)
                panel.step(values, height, color=colour, linestyle=style, label=label, where="post")
                panel.plot(np.median(values), 50, "o", color=colour, ms=4)
        panel.set(title=SETS[dataset], xlabel="selectivity (0 to 1)", ylim=(0, 101))
        panel.set_xlim(0, None)
        plain(panel)
    panels[0, 0].set_ylabel("living units at most\nas selective (%)", fontsize=9)
    legend_below(figure, panels, 5)
    return as_png(figure)


def first_arm(measured: Measured, dataset: str) -> str:
    """Choose an arm of a data set, Top-k if it was run; untrained, most are the same model."""
    return next(arm for arm in measured.arms if measured.has(dataset, arm))


def unit_sets(
    measured: Measured, dataset: str
) -> list[tuple[str, str, str, list[Mapping[str, Any]]]]:
    """List label, colour, line style and the units of each seed: untrained, then by arm."""
    first = measured.of(dataset, first_arm(measured, dataset))
    untrained = [content["results"]["untrained"]["units"] for content in first.values()]
    sets = [("untrained", "black", "-.", untrained)]
    for arm in ("dense", "topk", "l1"):
        units = [
            content["results"]["schedule"]["units"]
            for content in measured.of(dataset, arm).values()
        ]
        if units:
            sets.append((named(arm), COLOURS[arm], "--" if arm == "dense" else "-", units))
    return sets


def pareto(measured: Measured) -> bytes:
    """Draw never active units against reconstruction: the cures, Top-k and the controls."""
    figure, panels = new_figure(4.4, 1, len(measured.datasets), sharey=True)
    for panel, dataset in zip(panels[0], measured.datasets, strict=True):
        cures = measured.of_group("cure")
        for arm in [UNCURED, "dense", *cures]:
            if not measured.has(dataset, arm):
                continue
            x = measured.known(dataset, arm, at_end_of_schedule("reconstruction"))
            y = measured.known(dataset, arm, never_active)
            note = ", uncured" if arm == UNCURED else ""
            panel.errorbar(
                x.mean, 100 * y.mean, xerr=x.sd, yerr=None if y.sd is None else 100 * y.sd,
                color=COLOURS[arm], marker=MARKS[arm], ms=9 if arm == UNCURED else 6, capsize=2,
                linestyle="none", elinewidth=1, label=named(arm) + note,
                markeredgecolor="black" if arm == UNCURED else COLOURS[arm],
            )  # fmt: skip
        panel.axhline(100 * CURED_BELOW, color="black", linestyle=":", linewidth=1)
        panel.locator_params(axis="x", nbins=5)
        panel.set(title=SETS[dataset], xlabel="reconstruction (nats per image)")
        plain(panel)
    # Not before: a limit set by hand ends the scaling of the axis that the panels share.
    panels[0, 0].set_ylim(bottom=-2)
    panels[0, 0].set_ylabel("never active units (%)", fontsize=9)
    legend_below(figure, panels)
    return as_png(figure)
