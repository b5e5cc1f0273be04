"""Sentences on MIG, on what living units tell, and on other ways to count dead ones."""

from __future__ import annotations

from collections.abc import Iterator

from ...grid import STUDY
from ..activity import first_cut_epoch
from ..measurements import (
    Measured,
    median_selectivity,
    mig_score,
    never_active,
    never_active_drawn,
    random_mig,
    records_by_k,
    threshold_range,
    untrained_mig,
    untrained_selectivity,
)
from ..names import definition, named
from ..statistics import (
    in_words,
    paired_change,
    span,
    spread,
)


def mig(measured: Measured, dataset: str) -> Iterator[str]:
    """Say how large MIG is and whether training raised it."""
    for arm in STUDY:
        cells = list(measured.of(dataset, arm).values())
        if not cells:
            continue
        end = measured.known(dataset, arm, mig_score)
        random = measured.known(dataset, arm, random_mig)
        gained = paired_change(
            spread(mig_score(content) - untrained_mig(content) for content in cells)
        )
        words = in_words(gained, "training raised it", "training lowered it")
        floor = " That is no more than three times the level of a random code."
        yield (
            f"MIG of the mean code at the end of the schedule under {named(arm)} is "
            f"{end.text(3)}, of a random code {random.text(3)}, of the same models before training "
            f"{measured.known(dataset, arm, untrained_mig).text(3)}, a change of "
            f"{gained.text(3)}: {words}." + (floor if end.mean <= 3 * random.mean else "")
        )
        yield from _mig_against_dense(measured, dataset, arm)
        yield from _mig_along(measured, dataset, arm)


def _mig_against_dense(measured: Measured, dataset: str, arm: str) -> Iterator[str]:
    """Say whether MIG differs from that of the dense control."""
    difference = measured.difference(dataset, arm, "dense", mig_score)
    if difference is None:
        return
    dense = measured.known(dataset, "dense", mig_score)
    words = in_words(difference, "higher", "lower")
    power = ""
    if difference.shown == 0 and difference.low is not None and difference.low <= -dense.mean:
        power = (
            " The interval reaches as far as the loss of all of the control's MIG, so it does not "
            "show that MIG is stable, either."
        )
    yield (
        f"MIG under {named(arm)} minus that of the dense control ({dense.text(3)}) is "
        f"{difference.text(3)}: {words}.{power}"
    )


def _mig_along(measured: Measured, dataset: str, arm: str) -> Iterator[str]:
    """Say how MIG moved from the last estimate before k cut to the end of the schedule.

    In the same runs.
    """
    pairs, before, runs = [], [], []
    for content in measured.of(dataset, arm).values():
        records = records_by_k(content, "mig")
        began = first_cut_epoch(content)
        uncut = [
            k for k, record in records.items() if began is not None and record["epoch"] < began
        ]
        if not uncut:
            return
        before.append(min(uncut))
        runs.append(records)
        pairs.append((records[min(uncut)]["mig"], records[min(records)]["mig"]))
    shared = set(runs[0]).intersection(*runs) if runs else set()
    if not shared:
        return
    moved = paired_change(spread(b - a for a, b in pairs))
    means = {k: spread(run[k]["mig"] for run in runs).mean for k in shared}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    ends = f"{means[low]:.3f} (k = {low}) and {means[high]:.3f} (k = {high})"
    yield (
        f"under {named(arm)}, from the last estimate before k cut (k = {span(before)}) "
        f"to the end, MIG changed by {moved.text(3)}: {in_words(moved, 'up', 'down')}. Over the "
        f"whole schedule its mean over the seeds lay between {ends}."
    )


def selectivity(measured: Measured, dataset: str) -> Iterator[str]:
    """Say how selective living units are."""
    lower = False
    for arm in STUDY:
        one = measured.spread(dataset, arm, median_selectivity)
        against = measured.difference(dataset, arm, "dense", median_selectivity)
        if one is None or against is None:
            continue
        dense = measured.known(dataset, "dense", median_selectivity)
        before = measured.known(dataset, arm, untrained_selectivity)
        cells = measured.of(dataset, arm).values()
        trained = paired_change(
            spread(
                median_selectivity(content) - untrained_selectivity(content) for content in cells
            )
        )
        lower |= against.shown == -1
        yield (
            f"the median selectivity of living units is {one.text(3)} under {named(arm)} and "
            f"{dense.text(3)} in the dense control, {against.text(3)}: "
            f"{in_words(against, 'higher', 'lower')}. Before training it is {before.text(3)}, a "
            f"change of {trained.text(3)}: "
            f"{in_words(trained, 'more selective', 'less selective than an untrained network')}."
        )
    if lower:
        yield (
            "part of that fall is mechanical: a unit tells at most the entropy of its own "
            "activity, which is small for one that is active on few images, and a cut makes units "
            "rarer. How large a part is not measured."
        )


def definitions(measured: Measured, dataset: str) -> Iterator[str]:
    """Say how much the dead share depends on the definition."""
    for arm in STUDY:
        shares = measured.panel(dataset, arm)
        if not shares:
            continue
        (low_name, low), (high_name, high) = threshold_range(shares)
        if high - low < 0.05:
            yield (
                f"the dead share under {named(arm)} depends little on the definition: "
                f"{100 * low:.1f} to {100 * high:.1f} % over the panel."
            )
        else:
            yield (
                f"the dead share under {named(arm)} depends on the definition: {100 * low:.1f} % "
                f"({definition(low_name)}) to {100 * high:.1f} % ({definition(high_name)})."
            )


def drawn_codes(measured: Measured, dataset: str) -> Iterator[str]:
    """Say what drawing z changes."""
    contents = [content for arm in STUDY for content in measured.of(dataset, arm).values()]
    if contents and contents[0]["config"]["placement"] == "encoder":
        yield "the sparse layer sits before z, so drawing z changes nothing about its dead units."
        return
    for arm in STUDY:
        mean = measured.spread(dataset, arm, never_active)
        drawn = measured.spread(dataset, arm, never_active_drawn)
        if mean and drawn and mean.mean > 0:
            yield (
                f"with z drawn in place of its mean, {drawn.percent()} % instead of "
                f"{mean.percent()} % are never active under {named(arm)}."
            )
