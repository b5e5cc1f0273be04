"""The sections of a report on active units, deaths, MIG and the further epochs."""

from __future__ import annotations

from collections.abc import Callable

from ....reproduction.document import Document, Heading, Paragraph, Table
from ...grid import STUDY
from .. import figures
from ..activity import (
    PHASES,
    describe_cut,
    first_cut_epoch,
    l1_strengths,
    phase_shares,
    silent_after_a_tenth,
    silent_before_cut,
    silent_share,
    split_silent,
)
from ..measurements import (
    Content,
    Measured,
    at_end_of_run,
    at_end_of_schedule,
    has_mig_records,
    mig_score,
    never_active,
    returned,
)
from ..names import SETS, STUDY_AND_CONTROLS, named
from ..statistics import Spread, span, spread


def active_units(document: Document, measured: Measured) -> None:
    """Add L0 and k, and from when on k cuts."""
    document.add(Heading("Active units"))
    if any(arm in measured.arms for arm in STUDY_AND_CONTROLS):
        document.picture(
            "active_units",
            figures.active_units(measured),
            "Active units per held-out image (L0) after each epoch, mean and standard deviation "
            "over seeds, and k (dashed), which L1's strength steers L0 to. Below: that strength "
            "in each epoch, a line for each seed.",
        )
    rows = []
    for arm, dataset in measured.columns(measured.arms):
        cuts = [describe_cut(content) for content in measured.of(dataset, arm).values()]
        epochs = [cut.epoch for cut in cuts if cut.epoch is not None]
        ks = [cut.k for cut in cuts if cut.k is not None]
        spreads = [spread(values).text() for values in (
            [cut.first for cut in cuts], [cut.before for cut in cuts], [cut.last for cut in cuts],
        )]  # fmt: skip
        begun = [span(epochs), span(ks)] if epochs else ["never", ""]
        rows.append([named(arm), SETS[dataset], spreads[0], *begun, *spreads[1:]])
    document.add(
        Table(
            [
                "arm", "data set", "L0, first epoch", "k cuts from epoch", "at k",
                "L0 before the cut", "L0, end of schedule",
            ],
            rows,
            "k cuts from the first epoch on after which the mean L0 is at least 0.95 k, with k "
            "below the number of units; above that, ReLU leaves fewer units active than k allows. "
            "On the held-out images.",
        )
    )  # fmt: skip


def courses(document: Document, measured: Measured) -> None:
    """Add dead share against epoch and k, when units died, and MIG."""
    document.add(Heading("Dead units during training"))
    if not any(arm in measured.arms for arm in STUDY_AND_CONTROLS):
        document.add(Paragraph("Left out: neither an arm of the study nor a control was run."))
        return
    document.picture(
        "dead_by_epoch",
        figures.dead_by_epoch(measured),
        "Units that are active on no held-out image, after each epoch; mean and standard "
        "deviation over seeds.",
    )
    if set(STUDY) & set(measured.arms):
        document.picture(
            "dead_by_k",
            figures.dead_by_k(measured),
            "The same against k, during the schedule only. k falls as training goes on, so the "
            "curves alone do not tell one from the other; the horizontal controls do. For L1, k is "
            "what L0 is steered to.",
        )
    _add_deaths(document, measured)
    document.add(Heading("Mutual information gap"))
    if has_mig_records(measured):
        document.picture(
            "mig_by_k",
            figures.mig_by_k(measured),
            "MIG of the mean code (20 bins) on the first test images during the schedule: mean "
            "over seeds, with a thin line for each seed; bars are the mean 95 % bootstrap interval "
            "of a run, which the seeds' spread exceeds where runs differ. Lines: MIG of all test "
            "images for the dense control, for the untrained model, and for random codes.",
        )
    elif set(STUDY) & set(measured.arms):
        document.add(Paragraph("No curves: MIG was not estimated during training (mig_every 0)."))
    _add_mig_table(document, measured)


def _add_deaths(document: Document, measured: Measured) -> None:
    """Add when units died."""
    document.add(Heading("When units died"))
    document.picture(
        "deaths",
        figures.deaths(measured),
        "Units that are silent on the held-out images at the end of the schedule, by their first "
        "epoch without activity since (mean over seeds), with k at that epoch above; dotted: where "
        "k begins to cut, for each seed. A rare unit can miss the last held-out passes by chance, "
        "so the last bars are too high.",
    )
    rows, sums = [], []
    for arm, dataset in measured.columns(STUDY_AND_CONTROLS):
        cells = measured.of(dataset, arm).values()
        shares = [spread(phase_shares(content)[phase] for content in cells) for phase in PHASES]
        curve = [measured.known(dataset, arm, get).percent()
                 for get in (silent_after_a_tenth, silent_before_cut, silent_share)]  # fmt: skip
        if all(first_cut_epoch(content) == 0 for content in cells):
            curve[1] = "k cuts at once"
        rows.append([named(arm), SETS[dataset], *curve, *(share.percent() for share in shares)])
        split = split_silent(measured, dataset, arm)
        if split is not None and arm in STUDY:
            sums.append(
                [
                    named(arm), SETS[dataset], split.whole.percent(), f"{100 * split.early:.1f}",
                    f"{100 * split.uncut:.1f}", split.excess.brief(1, 100),
                ]
            )  # fmt: skip
    document.add(
        Table(
            [
                "arm", "data set", "silent after a tenth", "silent before k cut",
                "silent at the end", *(f"of these: {phase}" for phase in PHASES),
            ],
            rows,
            "Share of all units (%). First the curve of silent units: after a tenth of the "
            "schedule, after the last epoch before k cut (where k never cuts, the last epoch), at "
            "the end. Then those silent at the end, by the time from which on they were silent, so "
            "that the last three columns add up to the third. Never alive: active on the held-out "
            "images after no epoch.",
        )
    )  # fmt: skip
    if sums:
        document.add(
            Table(
                [
                    "arm", "data set", "silent at the end", "= early: since before k cut",
                    "+ later, as in the dense control", "+ in excess of the dense control",
                ],
                sums,
                "The whole and its parts, in points of all units (%); the excess with its 95 % "
                "interval (Welch's t over the seeds). Early: silent for good since "
                "before k cut anything, which needs no sparsification. In excess: minus the dense "
                "control at the same epoch. Later: what is left, units that the dense control has "
                "silent, too, but not since before the cut; below 0 where fewer are silent in it "
                "than stayed silent here.",
            )
        )  # fmt: skip


def _add_mig_table(document: Document, measured: Measured) -> None:
    """Add MIG at the end of the schedule."""
    rows = []
    for arm, dataset in measured.columns(STUDY_AND_CONTROLS):
        cells = list(measured.of(dataset, arm).values())
        scores = [spread(content["results"]["schedule"][n]["score"] for content in cells)
                 for n in ("mig", "mig_monte_carlo", "mig_code")]  # fmt: skip
        scores.append(spread(content["results"]["untrained"]["mig"]["score"] for content in cells))
        scores.append(spread(content["results"]["mig_random"]["score"] for content in cells))
        rows.append([named(arm), SETS[dataset], *(score.text(3) for score in scores)])
    document.add(
        Table(
            ["arm", "data set", "mean code", "Monte Carlo", "sparse code", "untrained", "random"],
            rows,
            "MIG at the end of the schedule: of the mean code by histograms and by Monte Carlo, of "
            "the sparse code; of the mean code before training; of a random code.",
        )
    )


def further_epochs(document: Document, measured: Measured) -> None:
    """Add what the epochs after the schedule bring."""
    rows, changes = [], []
    epochs = set()
    for arm, dataset in measured.columns(STUDY):
        cells = [
            content
            for content in measured.of(dataset, arm).values()
            if content["config"]["extra_epochs"]
        ]
        if cells:
            epochs |= {content["config"]["extra_epochs"] for content in cells}
            counts_by_cell = [returned(content) for content in cells]
            counts = [spread(values).text(1) for values in zip(*counts_by_cell, strict=True)]
            rows.append([named(arm), SETS[dataset], *counts, str(len(cells))])
            changes += _before_and_after(f"{named(arm)}, {SETS[dataset]}", cells)
    plural = "" if epochs == {1} else "s"
    title = f"{'/'.join(map(str, sorted(epochs)))} more epoch{plural}" if epochs else "More epochs"
    document.add(Heading(title))
    if not rows:
        document.add(Paragraph("Left out: no run went on after its schedule."))
        return
    document.add(
        Table(
            ["arm", "data set", "dead before", "came back", "died", "dead after", "seeds"],
            rows,
            "Units, mean over seeds, never active on the test images at the end of the schedule "
            "and at the end of the run.",
        ),
        Table(
            [
                "", "never active (%)", "reconstruction (nats)", "KL (nats)", "MIG", "L0",
                "strength of L1",
            ],
            changes,
            "At the end of the schedule and at the end of the run, with the same k. The strength "
            "is the mean of the last epoch.",
        ),
    )  # fmt: skip


def _before_and_after(name: str, cells: list[Content]) -> list[list[str]]:
    """List the measurements at the end of the schedule and at the end of the run."""
    texts: list[tuple[Callable[[Content], float], Callable[[Spread], str]]] = [
        (never_active, Spread.percent),
        (at_end_of_schedule("reconstruction"), Spread.text),
        (at_end_of_schedule("kl"), lambda s: s.text(2)),
        (mig_score, lambda s: s.text(3)),
        (at_end_of_schedule("l0"), Spread.text),
    ]
    pairs = [pair for pair in map(l1_strengths, cells) if pair is not None]
    moments = (("schedule", cells), ("run", [at_end_of_run(content) for content in cells]))
    rows = []
    for number, (moment, contents) in enumerate(moments):
        row = [text(spread(map(get, contents))) for get, text in texts]
        row.append(spread(pair[number] for pair in pairs).text(2) if pairs else "")
        rows.append([f"{name}, end of {moment}", *row])
    return rows
