"""What can be concluded from the cells of a reproduction, in sentences chosen by their numbers.

A difference between arms is stated with its 95 % interval (Welch's t over the seeds), and called
one where the interval lies on one side of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..grid import STUDY
from . import on_collapse
from .activity import binding
from .figures import SETS, by_k, definition, named
from .on_collapse import NO_INTERVAL, in_words
from .statistics import CURED_BELOW, Spread, change, mig_floor, spread, welch
from .summary import (
    OTHER_DEFINITIONS,
    UNCURED,
    Content,
    Measured,
    after,
    median_selectivity,
    mig_score,
    never,
    never_sampled,
    random_mig,
    threshold_range,
    untrained_mig,
    untrained_selectivity,
)


def conclusions(measured: Measured) -> dict[str, list[str]]:
    """Write sentences by what they are about: each data set, then the claims and the cures."""
    found = {SETS[dataset]: list(_of_dataset(measured, dataset)) for dataset in measured.datasets}
    found["The study's orderings, and the cures"] = [*_orderings(measured), *_cures(measured)]
    return {title: texts for title, texts in found.items() if texts}


def _of_dataset(measured: Measured, dataset: str) -> Iterator[str]:
    """Say everything about a data set."""
    parts: tuple[Callable[[Measured, str], Iterator[str]], ...] = (
        on_collapse.active_units,
        on_collapse.without_sparsification,
        on_collapse.by_part,
        on_collapse.fixed,
        on_collapse.steering,
        on_collapse.further_epochs,
        _mig,
        _selectivity,
        _definitions,
        _sampled,
    )
    for part in parts:
        for text in part(measured, dataset):
            yield text[0].upper() + text[1:]


# -- MIG -------------------------------------------------------------------------------------------


def _mig(measured: Measured, dataset: str) -> Iterator[str]:
    """Say how large MIG is and whether training raised it."""
    for arm in STUDY:
        cells = list(measured.of(dataset, arm).values())
        if not cells:
            continue
        end = measured.known(dataset, arm, mig_score)
        random = measured.known(dataset, arm, random_mig)
        gained = change(spread(mig_score(c) - untrained_mig(c) for c in cells))
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
        records = by_k(content, "mig")
        began = binding(content)
        uncut = [k for k, r in records.items() if began is not None and r["epoch"] < began]
        if not uncut:
            return
        before.append(min(uncut))
        runs.append(records)
        pairs.append((records[min(uncut)]["mig"], records[min(records)]["mig"]))
    shared = set(runs[0]).intersection(*runs) if runs else set()
    if not shared:
        return
    moved = change(spread(b - a for a, b in pairs))
    means = {k: spread(run[k]["mig"] for run in runs).mean for k in shared}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    ends = f"{means[low]:.3f} (k = {low}) and {means[high]:.3f} (k = {high})"
    yield (
        f"under {named(arm)}, from the last estimate before k cut (k = {on_collapse.span(before)}) "
        f"to the end, MIG changed by {moved.text(3)}: {in_words(moved, 'up', 'down')}. Over the "
        f"whole schedule its mean over the seeds lay between {ends}."
    )


# -- what living units tell, and definitions -------------------------------------------------------


def _selectivity(measured: Measured, dataset: str) -> Iterator[str]:
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
        trained = change(spread(median_selectivity(c) - untrained_selectivity(c) for c in cells))
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


def _definitions(measured: Measured, dataset: str) -> Iterator[str]:
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


def _sampled(measured: Measured, dataset: str) -> Iterator[str]:
    """Say what drawing z changes."""
    contents = [c for arm in STUDY for c in measured.of(dataset, arm).values()]
    if contents and contents[0]["config"]["placement"] == "encoder":
        yield "the sparse layer sits before z, so drawing z changes nothing about its dead units."
        return
    for arm in STUDY:
        mean = measured.spread(dataset, arm, never)
        drawn = measured.spread(dataset, arm, never_sampled)
        if mean and drawn and mean.mean > 0:
            yield (
                f"with z drawn in place of its mean, {drawn.percent()} % instead of "
                f"{mean.percent()} % are never active under {named(arm)}."
            )


# -- both data sets --------------------------------------------------------------------------------


def _orderings(measured: Measured) -> Iterator[str]:
    """Say whether the study's orderings are seen."""
    for arm in STUDY:
        one = measured.spread("shapes3d", arm, never)
        two = measured.spread("dsprites", arm, never)
        if one and two:
            place = f"Shapes3D has more dead units than dSprites under {named(arm)}"
            yield _ordering(place, one, two)
    for dataset in measured.datasets:
        one = measured.spread(dataset, "l1", never)
        two = measured.spread(dataset, "topk", never)
        if one and two:
            claim = f"L1 leaves more dead units than Top-k on {SETS[dataset]}"
            yield _ordering(claim, one, two)
            further = {c["config"]["extra_epochs"] for arm in ("l1", "topk")
                       for c in measured.of(dataset, arm).values()}  # fmt: skip
            if further != {0}:
                ends = (measured.known(dataset, arm, _never_after) for arm in ("l1", "topk"))
                yield _ordering(f"{claim} after the further epochs", *ends)


def _never_after(content: Content) -> float:
    """Return the share of units that are active on no test image at the end of the run."""
    return never(after(content))


def _ordering(claim: str, one: Spread, two: Spread) -> str:
    """Say whether a claimed ordering is seen."""
    difference = welch(one, two)
    words = {
        None: f"is not decided ({NO_INTERVAL})",
        0: "is neither shown nor reversed",
        1: "is seen here",
        -1: "is reversed here",
    }[difference.shown]
    return (
        f"That {claim} {words}: {one.percent()} against {two.percent()} %, {difference.points()}."
    )


def _cures(measured: Measured) -> Iterator[str]:
    """Say which cures there are."""
    cures = measured.of_group("cure")
    if not cures:
        return
    passed = []
    for cure in cures:
        verdicts = [measured.verdict(dataset, cure) for dataset in measured.datasets]
        if all(v is not None and v.all for v in verdicts):
            passed.append(cure)
    sets = " and ".join(SETS[d] for d in measured.datasets)
    rule = (
        f"never active below {100 * CURED_BELOW:.0f} % (mean over seeds), with reconstruction and "
        f"MIG at most one standard deviation of the uncured arm worse than its means, on {sets}"
    )
    if passed:
        yield f"Cures that reach {rule}: {', '.join(passed)}."
    else:
        yield f"No cure that was run reaches {rule}."
    yield from _blind(measured, cures)
    for dataset in measured.datasets:
        for cure in passed:
            yield _by_other_definitions(measured, dataset, cure)


def _blind(measured: Measured, cures: list[str]) -> Iterator[str]:
    """Say where the MIG of the uncured arm scatters too widely to decide."""
    for dataset in measured.datasets:
        found = [measured.verdict(dataset, cure) for cure in cures]
        if any(v is not None and v.blind for v in found):
            uncured = measured.known(dataset, UNCURED, mig_score)
            yield (
                f"On {SETS[dataset]} the uncured MIG scatters so widely ({uncured.text(3)}) that a "
                f'cure with MIG {mig_floor(uncured):.3f} would pass, so "MIG no worse" says '
                "little there."
            )


def _by_other_definitions(measured: Measured, dataset: str, cure: str) -> str:
    """Say what a cure is worth by each definition."""
    one, two = (measured.panel(dataset, arm) for arm in (cure, UNCURED))
    shares = "; ".join(
        f"{definition(name)}: {one[name].percent()} against {two[name].percent()} %"
        for name in ("never", *OTHER_DEFINITIONS)
        if name in one
    )
    return f"By each definition, {cure} against uncured on {SETS[dataset]}: {shares}."
