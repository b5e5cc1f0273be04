"""What can be concluded from the cells of a reproduction, in sentences chosen by their numbers.

A difference counts when its mean over the seeds exceeds its standard deviation over them. That is a
rule of reading, not a test of significance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..grid import STUDY
from .figures import SETS, by_k, definition, named
from .summary import (
    CURED_BELOW,
    L0_TOLERANCE,
    PHASES,
    Measured,
    Spread,
    compared,
    larger_sd,
    median_selectivity,
    mig_score,
    never,
    never_sampled,
    phases,
    returned,
    scheduled,
    spread,
    threshold_range,
)


def conclusions(measured: Measured) -> dict[str, list[str]]:
    """Sentences by what they are about: each data set, then the study's claims and the cures."""
    found = {SETS[dataset]: list(_of_dataset(measured, dataset)) for dataset in measured.datasets}
    found["The study's orderings, and the cures"] = [*_orderings(measured), *_cures(measured)]
    return {title: texts for title, texts in found.items() if texts}


def _of_dataset(measured: Measured, dataset: str) -> Iterator[str]:
    parts: tuple[Callable[[Measured, str], Iterator[str]], ...] = (
        _without_sparsification,
        _by_phase,
        _by_schedule,
        _fixed,
        _mig,
        _selectivity,
        _definitions,
        _sampled,
        _steered,
        _further_epochs,
    )
    for part in parts:
        for text in part(measured, dataset):
            yield text[0].upper() + text[1:]


def points(difference: Spread) -> str:
    """A difference of shares, in words: "+3.1 ± 0.4 percentage points"."""
    return f"{signed(difference)} percentage points"


def signed(difference: Spread) -> str:
    """A difference of shares in percent, with its sign."""
    return ("+" if difference.mean >= 0 else "") + difference.percent()


def seeds(count: int) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _without_sparsification(measured: Measured, dataset: str) -> Iterator[str]:
    dense = measured.spread(dataset, "dense", never)
    if dense is None:
        yield (
            "no cell of the dense control is finished, so the part of the dead units that needs no "
            "sparsification is unknown."
        )
    else:
        yield (
            f"{dense.percent()} % of the units are never active although the layer was never "
            f"sparsified (dense control, {seeds(dense.n)})."
        )


def _by_phase(measured: Measured, dataset: str) -> Iterator[str]:
    for arm in STUDY:
        cells = measured.of(dataset, arm).values()
        if not cells:
            continue
        found = {phase: spread(phases(c)[phase] for c in cells) for phase in PHASES}
        total = sum(s.mean for s in found.values())
        if total == 0:
            yield f"under {named(arm)} no unit was dead on the held-out images at the end."
            continue
        early = found[PHASES[0]].mean + found[PHASES[1]].mean
        words = ", ".join(f"{s.percent()} % {phase}" for phase, s in found.items())
        size = _part_in_words(early / total)
        yield (
            f"under {named(arm)}, these shares of all units died for good, by the end of the run: "
            f"{words}. So {size} of the "
            f"deaths ({100 * early / total:.0f} %) came early, before k had fallen by a tenth."
        )


def _part_in_words(share: float) -> str:
    if share == 0:
        return "none"
    for limit, words in ((0.1, "a small part"), (0.4, "less than half"), (0.6, "about half")):
        if share < limit:
            return words
    return "most" if share < 1 else "all"


def _by_schedule(measured: Measured, dataset: str) -> Iterator[str]:
    for arm in STUDY:
        difference = measured.difference(dataset, arm, "dense", never)
        if difference is None:
            continue
        share = difference.mean / max(measured.known(dataset, arm, never).mean, 1e-9)
        rule = {
            None: "with 1 seed there is no spread to compare this with",
            1: f"more than its spread over the seeds, so this part, {100 * min(share, 1):.0f} % of "
            "the dead units, is due to sparsification",
            0: "within its spread over the seeds, so no part is shown to be due to sparsification",
            -1: "sparsification left fewer units dead than training without it",
        }[compared(difference)]
        yield (
            f"{named(arm)} minus dense is {points(difference)} of never active units "
            f"({seeds(difference.n)}): {rule}."
        )


def _fixed(measured: Measured, dataset: str) -> Iterator[str]:
    difference = measured.difference(dataset, "fixed", "topk", never)
    if difference is None:
        return
    rule = {
        None: "with 1 seed there is no spread to compare this with",
        1: "the schedule saves units, compared with the final k from the start",
        0: "no difference beyond the spread, so the schedule does not matter for the number of "
        "dead units here",
        -1: "the schedule leaves more units dead than the final k from the start does",
    }[compared(difference)]
    yield (
        f"with the final k from the first epoch, never active units differ by "
        f"{points(difference)} from those under the schedule: {rule}."
    )


def _mig(measured: Measured, dataset: str) -> Iterator[str]:
    for arm in STUDY:
        cells = list(measured.of(dataset, arm).values())
        if not cells:
            continue
        end = measured.known(dataset, arm, mig_score)
        random = spread(c["results"]["mig_random"]["score"] for c in cells)
        floor = " That is no more than three times the level of a random code."
        yield (
            f"MIG of the mean code after the schedule under {named(arm)} is {end.text(3)} "
            f"(random code {random.text(3)})." + (floor if end.mean <= 3 * random.mean else "")
        )
        yield from _mig_against_dense(measured, dataset, arm, end)
        yield from _mig_along(measured, dataset, arm)


def _mig_against_dense(measured: Measured, dataset: str, arm: str, end: Spread) -> Iterator[str]:
    dense = measured.spread(dataset, "dense", mig_score)
    more = measured.difference(dataset, arm, "dense", never)
    if dense is None or more is None:
        return
    sd = larger_sd(end, dense)
    if sd is None:
        yield (
            f"the dense control has MIG {dense.text(3)}; whether the difference to {named(arm)} "
            "exceeds the spread cannot be said with 1 seed."
        )
        return
    change = end.mean - dense.mean
    within = abs(change) <= sd
    words = "stays within" if within else ("rises beyond" if change > 0 else "falls beyond")
    yield (
        f"against the dense control ({dense.text(3)}), MIG under {named(arm)} {words} the spread "
        f"over the seeds ({sd:.3f}) while never active units change by {points(more)}."
    )


def _mig_along(measured: Measured, dataset: str, arm: str) -> Iterator[str]:
    """From half way of the schedule to its end, in the same runs."""
    pairs = []
    ks: set[tuple[int, int]] = set()
    for content in measured.of(dataset, arm).values():
        records = by_k(content, "mig")
        half = content["config"]["k_start"] / 2
        between = [k for k in records if k >= half]
        if not between or min(between) == min(records):
            return
        ks.add((min(between), min(records)))
        pairs.append((records[min(between)]["mig"], records[min(records)]["mig"]))
    if len(ks) != 1:
        return
    (high, low) = ks.pop()
    change = spread(b - a for a, b in pairs)
    rule = {
        None: "1 seed",
        1: "up, beyond the spread",
        0: "within the spread",
        -1: "down, beyond the spread",
    }[compared(change)]
    yield (
        f"under {named(arm)}, between k = {high} and k = {low}, MIG changed by "
        f"{change.text(3)} ({rule})."
    )


def _selectivity(measured: Measured, dataset: str) -> Iterator[str]:
    for arm in STUDY:
        one = measured.spread(dataset, arm, median_selectivity)
        dense = measured.spread(dataset, "dense", median_selectivity)
        change = measured.difference(dataset, arm, "dense", median_selectivity)
        if one is None or dense is None or change is None:
            continue
        rule = {
            None: "1 seed, so no spread to judge by",
            1: "higher, beyond the spread",
            0: "no difference beyond the spread",
            -1: "lower, beyond the spread",
        }[compared(change)]
        yield (
            f"the median selectivity of living units is {one.text(3)} under {named(arm)} and "
            f"{dense.text(3)} in the dense control: {rule}."
        )


def _definitions(measured: Measured, dataset: str) -> Iterator[str]:
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


def _steered(measured: Measured, dataset: str) -> Iterator[str]:
    cells = measured.of(dataset, "l1")
    if not cells:
        return
    off = []
    for seed, content in cells.items():
        k, l0 = (content["results"]["schedule"][name] for name in ("k", "l0"))
        if abs(l0 - k) > L0_TOLERANCE * k:
            off.append(f"seed {seed}: {l0:.1f} for k = {k}")
    if off:
        yield (
            f"L0 under L1 ended more than 10 % away from k ({'; '.join(off)}), so the rows of L1 "
            "are not comparable with those of Top-k."
        )
    else:
        l0 = measured.known(dataset, "l1", scheduled("l0"))
        yield f"L0 under L1 ended within 10 % of k: {l0.text(1)}."


def _further_epochs(measured: Measured, dataset: str) -> Iterator[str]:
    for arm in STUDY:
        cells = [c for c in measured.of(dataset, arm).values() if c["config"]["extra_epochs"]]
        if not cells:
            continue
        found = [returned(c) for c in cells]
        dead, back = sum(r.dead_before for r in found), sum(r.back for r in found)
        died = sum(r.died for r in found)
        epochs = cells[0]["config"]["extra_epochs"]
        if dead == 0:
            yield f"under {named(arm)} no unit was dead after the schedule; {died} died later."
            continue
        verb = "brought none" if back == 0 else f"brought {back} ({100 * back / dead:.0f} %)"
        yield (
            f"{epochs} more epochs under {named(arm)} {verb} of {dead} dead units back "
            f"({seeds(len(cells))}{' together' if len(cells) > 1 else ''}), and {died} others died."
        )


# -- both data sets --------------------------------------------------------------------------------


def _orderings(measured: Measured) -> Iterator[str]:
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
            yield _ordering(f"L1 leaves more dead units than Top-k on {SETS[dataset]}", one, two)


def _ordering(claim: str, one: Spread, two: Spread) -> str:
    numbers = f"{one.percent()} against {two.percent()} %"
    sd = larger_sd(one, two)
    text = f"That {claim}"
    if sd is None:
        way = "has the same" if one.mean > two.mean else "does not have that"
        return f"{text}: 1 seed {way} direction ({numbers}); there is no spread to judge by."
    if abs(one.mean - two.mean) <= sd:
        return f"{text} is neither seen nor reversed: {numbers}, within the spread."
    return f"{text} is {'seen' if one.mean > two.mean else 'reversed'} here: {numbers}."


def _cures(measured: Measured) -> Iterator[str]:
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
        f"never active below {100 * CURED_BELOW:.0f} % at reconstruction and MIG no worse than "
        f"uncured on {sets}"
    )
    if passed:
        yield f"Cures that reach {rule}: {', '.join(passed)}."
    else:
        yield f"No cure that was run reaches {rule}, as far as the seeds can tell."
