"""The sections of a report on arms that differ from the study's: cures, placements, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..grid import ARMS, Cell
from . import figures
from .conclusions import signed
from .document import Document, Heading, Items, Paragraph, Table
from .figures import SETS, named
from .summary import PHASES, UNCURED, Measured, mig_score, never, phases, scheduled, spread
from .tables import differing


def _yes(value: bool | None) -> str:
    return "not decided (1 seed)" if value is None else "yes" if value else "no"


def cures(document: Document, measured: Measured) -> None:
    """Pareto plot, table and verdicts."""
    document.add(Heading("Cures"))
    arms = measured.of_group("cure")
    if not arms:
        document.add(Paragraph("Left out: no cure was run."))
        return
    document.picture(
        "pareto",
        figures.pareto(measured),
        "Never active units against reconstruction at the end of the schedule; bars are standard "
        "deviations over seeds, the dotted line is 5 %. Lower left is better.",
    )
    for dataset in measured.datasets:
        rows = []
        for arm in (UNCURED, *arms):
            if measured.has(dataset, arm):
                found = measured.verdict(dataset, arm) if arm in arms else None
                name = named(arm) + ("" if arm in arms else ", uncured")
                words = [_yes(answer) for answer in found] if found else ["", "", ""]
                rows.append([name, *_numbers(measured, dataset, arm), *words])
        head = [
            "arm", "never active (%)", "reconstruction (nats)", "MIG", "below 5 %",
            "reconstruction no worse", "MIG no worse",
        ]  # fmt: skip
        document.add(Table(head, rows, f"{SETS[dataset]}: cures and verdicts."))
    document.add(
        Paragraph(
            "Rule: below 5 % by the mean over seeds. Reconstruction is no worse when the cured "
            "mean is at most the uncured mean plus the larger of both standard deviations over "
            "seeds; MIG is no worse when it is at least the uncured mean minus that."
        ),
        Items([f"{arm}: {ARMS[arm].text}.{_idle(measured, arm)}" for arm in arms]),
    )


def _idle(measured: Measured, arm: str) -> str:
    """A warning where the revival of dead units cannot have begun during the schedule."""
    for cell, content in measured.cells.items():
        config = content["config"]
        seen = config["images"] * config["epochs"]
        if cell.arm == arm and config["revival"] != "none" and config["dead_after"] >= seen:
            return (
                f" It did nothing: a unit counts as dead to it after {config['dead_after']} images "
                f"without activity, and the schedule has {seen} images."
            )
    return ""


def _numbers(measured: Measured, dataset: str, arm: str) -> list[str]:
    return [
        measured.known(dataset, arm, never).percent(),
        measured.known(dataset, arm, scheduled("reconstruction")).text(1),
        measured.known(dataset, arm, mig_score).text(3),
    ]


def sensitivity(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """Placements and schedules."""
    document.add(Heading("Sensitivity to placement and schedule"))
    arms = [*measured.of_group("placement"), *measured.of_group("schedule")]
    if not arms:
        document.add(Paragraph("Left out: no other placement or schedule was run."))
        return
    for dataset in measured.datasets:
        rows = []
        for arm in ["topk", *arms]:
            cells = measured.of(dataset, arm)
            if not cells:
                continue
            seed, content = next(iter(cells.items()))
            changes = differing(Cell(dataset, arm, seed), content, asked)
            settings = ", ".join(f"{n} {v}" for n, v in changes.items() if n != "extra_epochs")
            change = measured.difference(dataset, arm, "topk", never)
            early = spread(phases(c)[PHASES[0]] + phases(c)[PHASES[1]] for c in cells.values())
            rows.append(
                [
                    named(arm),
                    settings or "the protocol",
                    *_numbers(measured, dataset, arm),
                    early.percent(),
                    "" if arm == "topk" or change is None else signed(change),
                    measured.known(dataset, arm, scheduled("k")).text(0),
                    measured.known(dataset, arm, scheduled("l0")).text(1),
                ]
            )
        head = [
            "arm", "setting", "never active (%)", "reconstruction (nats)", "MIG", "died early (%)",
            "minus Top-k (points)", "last k", "L0",
        ]  # fmt: skip
        caption = f"{SETS[dataset]}: Top-k with one choice of the protocol made otherwise."
        document.add(Table(head, rows, caption))
