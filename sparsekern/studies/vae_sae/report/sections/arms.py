"""The sections of a report on arms: all of them side by side, cures, placements, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....reproduction.document import Document, Heading, Items, Paragraph, Table
from ...grid import ARMS, Cell
from .. import figures
from ..activity import silent_since_before_cut
from ..measurements import (
    OTHER_DEFINITIONS,
    UNCURED,
    Measured,
    at_end_of_schedule,
    mig_score,
    never_active,
)
from ..names import SETS, definition, named
from ..raw_results import differing
from ..statistics import CURED_BELOW, mig_floor


def every_arm(document: Document, measured: Measured) -> None:
    """Add reconstruction, KL, L0, MIG and dead units of each arm."""
    rows = [
        [
            named(arm),
            SETS[dataset],
            *_main_numbers(measured, dataset, arm),
            measured.known(dataset, arm, at_end_of_schedule("kl")).text(2),
            measured.known(dataset, arm, at_end_of_schedule("l0")).text(1),
            str(len(measured.of(dataset, arm))),
        ]
        for arm, dataset in measured.columns(measured.arms)
    ]
    document.add(
        Heading("Every arm"),
        Table(
            [
                "arm", "data set", "never active (%)", "reconstruction (nats)", "MIG", "KL (nats)",
                "L0", "seeds",
            ],
            rows,
            "At the end of the schedule, on the test images; MIG is that of the mean code.",
        ),
    )  # fmt: skip


def _verdict_in_words(value: bool | None) -> str:
    """Say a verdict."""
    return "not decided (1 seed)" if value is None else "yes" if value else "no"


def cures(document: Document, measured: Measured) -> None:
    """Add the Pareto plot, the tables and the verdicts of cures."""
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
        _add_cures_of(document, measured, dataset, arms)
    document.add(
        Paragraph(
            f"Rule: below {100 * CURED_BELOW:.0f} % by the mean over seeds. Reconstruction is no "
            "worse when the cured mean is at most the uncured mean plus the uncured arm's standard "
            "deviation over seeds; MIG is no worse when it is at least the uncured mean minus "
            "that. The rule has no known error rate; the intervals beside it show which "
            "differences these seeds leave possible."
        ),
        Items([f"{arm}: {ARMS[arm].text}.{_idle_warning(measured, arm)}" for arm in arms]),
    )


def _add_cures_of(document: Document, measured: Measured, dataset: str, arms: list[str]) -> None:
    """Add the tables of cures of a data set."""
    shares, verdicts = [], []
    for arm in (UNCURED, *arms):
        if not measured.has(dataset, arm):
            continue
        panel = measured.panel(dataset, arm)
        name = named(arm) + ("" if arm in arms else ", uncured")
        dead, *others = _main_numbers(measured, dataset, arm)
        wider = [panel[n].percent() if n in panel else "" for n in OTHER_DEFINITIONS]
        shares.append([name, dead, *wider, *others])
        cure_verdict = measured.verdict(dataset, arm) if arm in arms else None
        if cure_verdict is not None:
            floor = mig_floor(measured.known(dataset, UNCURED, mig_score))
            mig = _verdict_in_words(cure_verdict.mig) + (
                f" (a MIG of {floor:.3f} is, too)"
                if cure_verdict.mig and cure_verdict.blind
                else ""
            )
            verdicts.append(
                [
                    name,
                    _verdict_in_words(cure_verdict.alive),
                    _against_uncured(measured, dataset, arm, "reconstruction"),
                    _verdict_in_words(cure_verdict.reconstruction),
                    _against_uncured(measured, dataset, arm, "mig"),
                    mig,
                ]
            )
    names = [f"{definition(n)} (%)" for n in OTHER_DEFINITIONS]
    head = ["arm", "never active (%)", *names, "reconstruction (nats)", "MIG"]
    document.add(Table(head, shares, f"{SETS[dataset]}: cures, with other definitions of dead."))
    if verdicts:
        head = [
            "cure", "below 5 %", "reconstruction minus uncured", "no worse", "MIG minus uncured",
            "no worse",
        ]  # fmt: skip
        caption = (
            f"{SETS[dataset]}: verdicts by the rule below, and differences with their 95 % "
            "intervals (Welch's t over the seeds)."
        )
        document.add(Table(head, verdicts, caption))


def _against_uncured(measured: Measured, dataset: str, arm: str, name: str) -> str:
    """Format the difference of an arm from the uncured one."""
    get, digits = (mig_score, 3) if name == "mig" else (at_end_of_schedule(name), 1)
    difference = measured.difference(dataset, arm, UNCURED, get)
    return "" if difference is None else difference.brief(digits)


def _idle_warning(measured: Measured, arm: str) -> str:
    """Warn where the revival of dead units cannot have begun during the schedule."""
    for cell, content in measured.cells.items():
        config = content["config"]
        seen = config["images"] * config["epochs"]
        if cell.arm == arm and config["revival"] != "none" and config["dead_after"] >= seen:
            return (
                f" It did nothing: a unit counts as dead to it after {config['dead_after']} images "
                f"without activity, and the schedule has {seen} images."
            )
    return ""


def _main_numbers(measured: Measured, dataset: str, arm: str) -> list[str]:
    """Format dead units, reconstruction and MIG of an arm."""
    return [
        measured.known(dataset, arm, never_active).percent(),
        measured.known(dataset, arm, at_end_of_schedule("reconstruction")).text(1),
        measured.known(dataset, arm, mig_score).text(3),
    ]


def sensitivity(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """Add placements and schedules."""
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
            settings = ", ".join(
                f"{name} {value}" for name, value in changes.items() if name != "extra_epochs"
            )
            change = measured.difference(dataset, arm, "topk", never_active)
            rows.append(
                [
                    named(arm),
                    settings or "the protocol",
                    *_main_numbers(measured, dataset, arm),
                    measured.known(dataset, arm, silent_since_before_cut).percent(),
                    "" if arm == "topk" or change is None else change.brief(1, 100),
                    measured.known(dataset, arm, at_end_of_schedule("k")).text(0),
                    measured.known(dataset, arm, at_end_of_schedule("l0")).text(1),
                ]
            )
        head = [
            "arm", "setting", "never active (%)", "reconstruction (nats)", "MIG",
            "silent since before k cut (%)", "never active minus Top-k (points)", "last k", "L0",
        ]  # fmt: skip
        caption = (
            f"{SETS[dataset]}: Top-k with one choice of the protocol made otherwise; differences "
            "with their 95 % intervals (Welch's t over the seeds)."
        )
        document.add(Table(head, rows, caption))
