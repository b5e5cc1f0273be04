"""What a report computes from the cells of a reproduction.

Dead shares, reconstruction, KL and MIG are those at the end of the schedule, on the test images
with z at its posterior mean, unless a name says otherwise: all arms have a schedule of
the same length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ....training import RunError
from ..grid import ARMS, Cell

Content = Mapping[str, Any]
"""Config, results and epoch records of a cell: see reproduction.read_cells."""
Getter = Callable[[Content], float]

EARLY_SHARE = 0.9  # of k_start; a unit that dies while k is at least that died early
CONSTANT_EARLY = 0.1  # where k is constant: of the epochs of the schedule
CURED_BELOW = 0.05
UNCURED = "topk"
L0_TOLERANCE = 0.1
PHASES = ("never alive", "early", "while k fell", "at the final k")
"""Of deaths. See :func:`phases`."""
PUBLISHED = {
    ("topk", "dsprites"): (34.4, 0.9),
    ("topk", "shapes3d"): (62.7, 1.3),
    ("l1", "dsprites"): (41.7, 4.4),
    ("l1", "shapes3d"): (90.6, 0.5),
}
"""Dead units in percent, mean and spread, of the abstract of arXiv 2603.18056."""
NEEDED = {
    "results": (
        "data", "test_images", "k", "reconstruction", "kl", "l0", "dead", "dead_sampled", "mig",
        "mig_code", "mig_random", "mig_monte_carlo", "units", "schedule", "untrained",
        "death_epoch", "images_per_second", "seconds", "device", "backends",
    ),
    "schedule": (
        "k", "reconstruction", "kl", "l0", "dead", "dead_sampled", "mig", "mig_code",
        "mig_monte_carlo", "units",
    ),
    "untrained": ("mig", "mig_code", "units", "dead"),
    "units": ("frequency", "mean", "selectivity", "factor"),
    "epoch record": ("epoch", "k", "eval_dead", "eval_l0", "eval_reconstruction"),
}  # fmt: skip


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds."""

    mean: float
    sd: float | None
    """None for one seed."""
    n: int

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Mean ± sd; without ± for one seed."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.sd is None else f"{mean} ± {scale * self.sd:.{digits}f}"

    def percent(self) -> str:
        """A share as percent, without the sign."""
        return self.text(1, 100)


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value."""
    found = list(values)
    sd = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), sd, len(found))


def larger_sd(*spreads: Spread) -> float | None:
    """The largest standard deviation; None when no spread has one."""
    return max((s.sd for s in spreads if s.sd is not None), default=None)


class Verdict(NamedTuple):
    """Of a cure, by the rule in :func:`verdict`; None where one seed cannot decide."""

    alive: bool
    reconstruction: bool | None
    mig: bool | None

    @property
    def all(self) -> bool:
        """Whether it is a yes three times."""
        return self.alive and self.reconstruction is True and self.mig is True


def verdict(
    dead: Spread, reconstruction: tuple[Spread, Spread], mig: tuple[Spread, Spread]
) -> Verdict:
    """Whether a cure is one.

    Args:
        dead: share of never active units of the cured arm; must be below 5 %.
        reconstruction: nats, cured and uncured; the cured mean may exceed the uncured one by the
            larger of both standard deviations.
        mig: cured and uncured; the cured mean may fall below the uncured one by as much.
    """
    worse = larger_sd(*reconstruction)
    lower = larger_sd(*mig)
    return Verdict(
        dead.mean < CURED_BELOW,
        None if worse is None else reconstruction[0].mean <= reconstruction[1].mean + worse,
        None if lower is None else mig[0].mean >= mig[1].mean - lower,
    )


def compared(difference: Spread) -> int | None:
    """1 or -1 when a mean difference exceeds its standard deviation over the seeds, 0 when it does
    not, None with one seed."""
    if difference.sd is None:
        return None
    if abs(difference.mean) <= difference.sd:
        return 0
    return 1 if difference.mean > 0 else -1


# -- one cell --------------------------------------------------------------------------------------


def never(content: Content) -> float:
    """Share of units that are active on no test image."""
    return content["results"]["schedule"]["dead"]["never"]


def never_sampled(content: Content) -> float:
    """The same with z drawn."""
    return content["results"]["schedule"]["dead_sampled"]["never"]


def scheduled(name: str) -> Getter:
    """Gives a scalar, such as reconstruction, kl or l0."""
    return lambda content: content["results"]["schedule"][name]


def mig_score(content: Content) -> float:
    """Of the mean code, by histograms."""
    return content["results"]["schedule"]["mig"]["score"]


def panel(content: Content) -> dict[str, float]:
    """Dead shares by definition."""
    return content["results"]["schedule"]["dead"]


def phase_of_units(content: Content) -> list[str | None]:
    """For each unit the phase of the run in which it died, None for a living one.

    "never alive" was inactive on the held-out images after every epoch, and on the test images
    before training. "early": died while k was at least 0.9 k_start; where k is constant, in the
    first tenth of the schedule. "at the final k": k was what it is at the
    end. Else "while k fell".
    """
    records, config = content["epochs"], content["config"]
    ks = [record["k"] for record in records]
    constant = len(set(ks)) == 1
    early_epochs = max(1, int(CONSTANT_EARLY * config["epochs"]))
    untrained = content["results"]["untrained"]["units"]["frequency"]
    found: list[str | None] = []
    for last, before in zip(content["results"]["death_epoch"], untrained, strict=True):
        if last is None:
            found.append(None)
            continue
        at = last + 1
        early = at < early_epochs if constant else ks[at] >= EARLY_SHARE * config["k_start"]
        if last == -1 and before == 0:
            found.append(PHASES[0])
        elif early:
            found.append(PHASES[1])
        else:
            found.append(PHASES[3] if ks[at] == ks[-1] else PHASES[2])
    return found


def phases(content: Content) -> dict[str, float]:
    """Share of all units that died in each of :data:`PHASES`."""
    found = phase_of_units(content)
    return {phase: found.count(phase) / len(found) for phase in PHASES}


class Returned(NamedTuple):
    """What became of units after the schedule, by the test images."""

    dead_before: int
    back: int
    """Of them active after the further epochs."""
    died: int
    """Active at the end of the schedule, but not after the further epochs."""
    dead_after: int


def returned(content: Content) -> Returned:
    """Counts units from the end of the schedule to the end of the run."""
    before = [f > 0 for f in content["results"]["schedule"]["units"]["frequency"]]
    after = [f > 0 for f in content["results"]["units"]["frequency"]]
    pairs = list(zip(before, after, strict=True))
    return Returned(
        before.count(False), pairs.count((False, True)), pairs.count((True, False)),
        after.count(False),
    )  # fmt: skip


def alive_selectivity(units: Mapping[str, Sequence[float]]) -> list[float]:
    """Selectivity of the units that were active at all."""
    pairs = zip(units["selectivity"], units["frequency"], strict=True)
    return [value for value, frequency in pairs if frequency > 0]


def median_selectivity(content: Content) -> float:
    """Of the units that are active at the end of the schedule; 0 when there are none."""
    values = alive_selectivity(content["results"]["schedule"]["units"])
    return statistics.median(values) if values else 0.0


def alive_factors(units: Mapping[str, Sequence[float]], count: int) -> list[int]:
    """For each of count factors, how many of the active units stand for it."""
    pairs = zip(units["factor"], units["frequency"], strict=True)
    chosen = [factor for factor, frequency in pairs if frequency > 0]
    return [chosen.count(factor) for factor in range(count)]


# -- all cells -------------------------------------------------------------------------------------


class Measured:
    """The finished cells of a reproduction, by data set and arm.

    Raises:
        RunError: a cell lacks a measurement, or its parts do not fit together; names it.
    """

    def __init__(self, found: Mapping[Cell, Content]) -> None:
        for cell, content in found.items():
            _check(cell, content)
        self.cells = dict(found)
        self.datasets = list(dict.fromkeys(cell.dataset for cell in found))
        there = {cell.arm for cell in found}
        self.arms = [arm for arm in ARMS if arm in there]

    def of(self, dataset: str, arm: str) -> dict[int, Content]:
        """The cells of an arm by seed, in order; empty when there are none."""
        chosen = {c.seed: v for c, v in self.cells.items() if (c.dataset, c.arm) == (dataset, arm)}
        return dict(sorted(chosen.items()))

    def has(self, dataset: str, *arms: str) -> bool:
        """Whether each arm has a finished cell."""
        return all(self.of(dataset, arm) for arm in arms)

    def spread(self, dataset: str, arm: str, get: Getter) -> Spread | None:
        """Over the seeds; None without a cell."""
        values = [get(content) for content in self.of(dataset, arm).values()]
        return spread(values) if values else None

    def known(self, dataset: str, arm: str, get: Getter) -> Spread:
        """Over the seeds, where there are cells."""
        found = self.spread(dataset, arm, get)
        if found is None:
            raise KeyError(f"no cell of {dataset}, {arm}")
        return found

    def difference(self, dataset: str, arm: str, other: str, get: Getter) -> Spread | None:
        """Of arm minus other, seed by seed, over the seeds that both have; None without one."""
        one, two = self.of(dataset, arm), self.of(dataset, other)
        values = [get(one[seed]) - get(two[seed]) for seed in one if seed in two]
        return spread(values) if values else None

    def of_group(self, group: str) -> list[str]:
        """The arms of a group that have cells."""
        return [arm for arm in self.arms if ARMS[arm].group == group]

    def verdict(self, dataset: str, cure: str) -> Verdict | None:
        """Of a cure, against Top-k; None without cells of both."""
        if not self.has(dataset, cure, UNCURED):
            return None

        def both(get: Getter) -> tuple[Spread, Spread]:
            return self.known(dataset, cure, get), self.known(dataset, UNCURED, get)

        dead = self.known(dataset, cure, never)
        return verdict(dead, both(scheduled("reconstruction")), both(mig_score))

    def panel(self, dataset: str, arm: str) -> dict[str, Spread]:
        """Dead shares by definition, over the seeds; empty without cells."""
        contents = list(self.of(dataset, arm).values())
        names = panel(contents[0]) if contents else {}
        return {name: spread(panel(c)[name] for c in contents) for name in names}


def threshold_range(shares: Mapping[str, Spread]) -> tuple[tuple[str, float], tuple[str, float]]:
    """The definitions with the smallest and the largest mean dead share, with it."""
    means = [(name, found.mean) for name, found in shares.items()]
    return min(means, key=lambda pair: pair[1]), max(means, key=lambda pair: pair[1])


def _check(cell: Cell, content: Content) -> None:
    def lacks(place: str, name: str) -> RunError:
        return RunError(
            f"cell {cell.name} lacks {name!r} in its {place}: it was run by another version; "
            "remove its folder and run it again"
        )

    results = content["results"]
    places = {
        "results": results,
        "schedule": results.get("schedule", {}),
        "untrained": results.get("untrained", {}),
    }
    for place, facts in places.items():
        for name in NEEDED[place]:
            if name not in facts:
                raise lacks(place, name)
    for facts in places.values():
        for name in NEEDED["units"]:
            if name not in facts["units"]:
                raise lacks("units", name)
    for record in content["epochs"]:
        for name in NEEDED["epoch record"]:
            if name not in record:
                raise lacks("epoch records", name)
    config = content["config"]
    wanted = config["epochs"] + config["extra_epochs"]
    if len(content["epochs"]) != wanted:
        raise RunError(
            f"cell {cell.name} has {len(content['epochs'])} epoch records, not {wanted}: "
            "remove its folder and run it again"
        )
