"""How many units are active and when they fall silent, from the cells of a reproduction.

On the held-out images after each epoch, during the schedule unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .measurements import Content, Measured
from .statistics import Difference, Spread, welch

BINDS_AT = 0.95
"""Of k: from the first epoch on with a mean L0 of at least that, k cuts active units."""
EARLY_SHARE = 0.1
LAST_SHARE = 0.2
TRANSIENT = 3.0
"""Times the strength at the end of the run; above, that at the end of the schedule has not
settled."""
PHASES = ("never alive", "before k cut", "while k cut")
"""Of the units that are silent at the end of the schedule. See :func:`phase_of_units`."""


def scheduled_epochs(content: Content) -> Sequence[Mapping[str, Any]]:
    """List the epoch records of the schedule."""
    records: Sequence[Mapping[str, Any]] = content["epochs"]
    return records[: content["config"]["epochs"]]


# -- active units ----------------------------------------------------------------------------------


def first_cut_epoch(content: Content) -> int | None:
    """Find the first epoch, from 0, in which k cut active units; None where it never did.

    There k is below the number of units, and L0 after the epoch at least 0.95 k.
    """
    units = content["config"]["units"]
    for epoch, record in enumerate(scheduled_epochs(content)):
        if record["k"] < units and record["eval_l0"] >= BINDS_AT * record["k"]:
            return epoch
    return None


class Cut(NamedTuple):
    """Active units of one cell."""

    first: float
    """L0 after the first epoch."""
    epoch: int | None
    """From 1, the first in which k cut; None when it never did."""
    k: int | None
    """In that epoch."""
    before: float
    """L0 after the last epoch before it; after the first where there is none."""
    last: float
    """L0 after the last epoch."""


def describe_cut(content: Content) -> Cut:
    """Summarise what the schedule did to the number of active units."""
    records = scheduled_epochs(content)
    first_cut = first_cut_epoch(content)
    before = records[(len(records) if first_cut is None else max(first_cut, 1)) - 1]
    return Cut(
        records[0]["eval_l0"],
        None if first_cut is None else first_cut + 1,
        None if first_cut is None else records[first_cut]["k"],
        before["eval_l0"],
        records[-1]["eval_l0"],
    )


class Lag(NamedTuple):
    """How far L0 was from what it is steered to."""

    share: float
    """(L0 - k) / k where it is largest, of the last fifth of the schedule."""
    epoch: int
    """From 1."""
    l0: float
    k: int


def largest_lag(content: Content) -> Lag:
    """Find the largest relative distance of L0 from k over the last fifth of the schedule."""
    records = scheduled_epochs(content)
    first = len(records) - max(1, round(LAST_SHARE * len(records)))
    lags = [
        Lag(
            (record["eval_l0"] - record["k"]) / record["k"],
            first + offset + 1,
            record["eval_l0"],
            record["k"],
        )
        for offset, record in enumerate(records[first:])
    ]
    return max(lags, key=lambda one: abs(one.share))


def l1_strengths(content: Content) -> tuple[float, float] | None:
    """Look up the mean strength of L1 in the last epochs of the schedule and of the run.

    None where there are no further epochs, or no strength was written.
    """
    last, settled = scheduled_epochs(content)[-1], content["epochs"][-1]
    if not content["config"]["extra_epochs"] or "strength" not in last:
        return None
    return last["strength"], settled["strength"]


# -- deaths ----------------------------------------------------------------------------------------


def phase_of_units(content: Content) -> list[str | None]:
    """Find for each unit the phase in which it fell silent for the rest of the schedule.

    None for one that is active after its last epoch.

    "never alive" was active on the held-out images after no epoch. "before k cut": its first epoch
    without activity lies before that in which k began to cut active units. Else "while k cut".
    """
    began = first_cut_epoch(content)
    unit_phases: list[str | None] = []
    for last in content["results"]["death_epoch"]:
        if last is None:
            unit_phases.append(None)
        elif last == -1:
            unit_phases.append(PHASES[0])
        else:
            unit_phases.append(PHASES[1] if began is None or last + 1 < began else PHASES[2])
    return unit_phases


def phase_shares(content: Content) -> dict[str, float]:
    """Compute the share of units in each of :data:`PHASES`; the sum is :func:`silent_share`."""
    unit_phases = phase_of_units(content)
    return {phase: unit_phases.count(phase) / len(unit_phases) for phase in PHASES}


def silent_since_before_cut(content: Content) -> float:
    """Compute the share of units that fell silent for good before k cut anything.

    Those that were never alive count, too, in a schedule whose k did not cut from the first epoch
    on.
    """
    shares = phase_shares(content)
    return shares[PHASES[1]] + (0.0 if first_cut_epoch(content) == 0 else shares[PHASES[0]])


def silent_share(content: Content) -> float:
    """Compute the share of units without activity after the last epoch of the schedule."""
    deaths = content["results"]["death_epoch"]
    return sum(last is not None for last in deaths) / len(deaths)


def silent_after_a_tenth(content: Content) -> float:
    """Look up the share of silent units after a tenth of the schedule."""
    records = scheduled_epochs(content)
    return float(records[max(1, int(EARLY_SHARE * len(records))) - 1]["eval_dead"])


def silent_before_cut(content: Content) -> float:
    """Look up the share of silent units after the last epoch before k cut.

    0 where k cut from the first epoch on.
    """
    first_cut = first_cut_epoch(content)
    records = scheduled_epochs(content)
    if first_cut is None:
        return float(records[-1]["eval_dead"])
    return float(records[first_cut - 1]["eval_dead"]) if first_cut else 0.0


class SilentParts(NamedTuple):
    """Silent units at the end of the schedule, as three shares of all units that add up."""

    whole: Spread
    early: float
    """Silent for good since before k cut anything."""
    uncut: float
    """Silent only later, as many as in the dense control, in which k never cuts."""
    excess: Difference
    """Over the dense control."""


def split_silent(measured: Measured, dataset: str, arm: str) -> SilentParts | None:
    """Split an arm's silent units; None without cells of the arm and of the dense control."""
    whole = measured.spread(dataset, arm, silent_share)
    dense = measured.spread(dataset, "dense", silent_share)
    if whole is None or dense is None:
        return None
    before = measured.known(dataset, arm, silent_since_before_cut).mean
    return SilentParts(whole, before, dense.mean - before, welch(whole, dense))


def shared_epochs(measured: Measured, dataset: str, arm: str) -> int:
    """Count the epochs that an arm and the dense control share: the least over the seeds.

    After those, runs with the same seed were still the same by their held-out measurements; 0
    without a pair.
    """
    one, two = measured.of(dataset, arm), measured.of(dataset, "dense")
    counts = []
    for seed in set(one) & set(two):
        pairs = zip(scheduled_epochs(one[seed]), scheduled_epochs(two[seed]), strict=False)
        same = [all(a[n] == b[n] for n in ("eval_l0", "eval_reconstruction")) for a, b in pairs]
        counts.append([*same, False].index(False))
    return min(counts, default=0)
