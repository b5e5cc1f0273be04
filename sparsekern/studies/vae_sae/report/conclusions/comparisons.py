"""Sentences on the orderings that the study claims, and on cures."""

from __future__ import annotations

from collections.abc import Iterator

from ...grid import STUDY
from ..measurements import (
    OTHER_DEFINITIONS,
    UNCURED,
    Content,
    Measured,
    at_end_of_run,
    mig_score,
    never_active,
)
from ..names import SETS, definition, named
from ..statistics import (
    CURED_BELOW,
    NO_INTERVAL,
    Spread,
    mig_floor,
    welch,
)


def orderings(measured: Measured) -> Iterator[str]:
    """Say whether the study's orderings are seen."""
    for arm in STUDY:
        one = measured.spread("shapes3d", arm, never_active)
        two = measured.spread("dsprites", arm, never_active)
        if one and two:
            claim = f"Shapes3D has more dead units than dSprites under {named(arm)}"
            yield _ordering(claim, one, two)
    for dataset in measured.datasets:
        one = measured.spread(dataset, "l1", never_active)
        two = measured.spread(dataset, "topk", never_active)
        if one and two:
            claim = f"L1 leaves more dead units than Top-k on {SETS[dataset]}"
            yield _ordering(claim, one, two)
            further = {content["config"]["extra_epochs"] for arm in ("l1", "topk")
                       for content in measured.of(dataset, arm).values()}  # fmt: skip
            if further != {0}:
                ends = (measured.known(dataset, arm, _never_active_after) for arm in ("l1", "topk"))
                yield _ordering(f"{claim} after the further epochs", *ends)


def _never_active_after(content: Content) -> float:
    """Return the share of units that are active on no test image at the end of the run."""
    return never_active(at_end_of_run(content))


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


def cures(measured: Measured) -> Iterator[str]:
    """Say which cures there are."""
    cures = measured.of_group("cure")
    if not cures:
        return
    passed = []
    for cure in cures:
        verdicts = [measured.verdict(dataset, cure) for dataset in measured.datasets]
        if all(verdict is not None and verdict.all for verdict in verdicts):
            passed.append(cure)
    sets = " and ".join(SETS[dataset] for dataset in measured.datasets)
    rule = (
        f"never active below {100 * CURED_BELOW:.0f} % (mean over seeds), with reconstruction and "
        f"MIG at most one standard deviation of the uncured arm worse than its means, on {sets}"
    )
    if passed:
        yield f"Cures that reach {rule}: {', '.join(passed)}."
    else:
        yield f"No cure that was run reaches {rule}."
    yield from _undecided_mig(measured, cures)
    for dataset in measured.datasets:
        for cure in passed:
            yield _by_other_definitions(measured, dataset, cure)


def _undecided_mig(measured: Measured, cures: list[str]) -> Iterator[str]:
    """Say where the MIG of the uncured arm scatters too widely to decide."""
    for dataset in measured.datasets:
        cure_verdicts = [measured.verdict(dataset, cure) for cure in cures]
        if any(verdict is not None and verdict.blind for verdict in cure_verdicts):
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
