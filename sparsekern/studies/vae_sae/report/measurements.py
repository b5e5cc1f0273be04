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
from ..grid import ARMS, STUDY, Cell
from .statistics import Difference, Spread, Verdict, spread, verdict, welch

Content = Mapping[str, Any]
"""Config, results and epoch records of a cell: see reproduction.read_cells."""
Getter = Callable[[Content], float]

UNCURED = "topk"
OTHER_DEFINITIONS = ("frequency<1e-03", "frequency<1e-02")
"""Of dead units, by which a cure is looked at besides."""
L0_TOLERANCE = 0.1
NEEDED = {
    "results": (
        "data", "test_images", "k", "reconstruction", "kl", "l0", "dead", "dead_sampled", "mig",
        "mig_code", "mig_random", "mig_monte_carlo", "units", "schedule", "untrained",
        "death_epoch", "death_epoch_after", "images_per_second", "seconds", "device",
        "backends",
    ),
    "schedule": (
        "k", "reconstruction", "kl", "l0", "dead", "dead_sampled", "mig", "mig_code",
        "mig_monte_carlo", "units",
    ),
    "untrained": ("mig", "mig_code", "units", "dead"),
    "units": ("frequency", "mean", "selectivity", "factor"),
    "epoch record": ("epoch", "k", "eval_dead", "eval_l0", "eval_reconstruction"),
}  # fmt: skip


# -- one cell --------------------------------------------------------------------------------------


def never_active(content: Content) -> float:
    """Look up the share of units that are active on no test image."""
    return float(content["results"]["schedule"]["dead"]["never"])


def never_active_drawn(content: Content) -> float:
    """Look up the share of units that are active on no test image with z drawn."""
    return float(content["results"]["schedule"]["dead_sampled"]["never"])


def at_end_of_schedule(name: str) -> Getter:
    """Make a getter of a scalar, such as reconstruction, kl or l0."""
    return lambda content: content["results"]["schedule"][name]


def mig_score(content: Content) -> float:
    """Look up MIG of the mean code, by histograms."""
    return float(content["results"]["schedule"]["mig"]["score"])


def at_end_of_run(content: Content) -> Content:
    """Put the measurements at the end of the run in the place of those of the schedule."""
    return {**content, "results": {**content["results"], "schedule": content["results"]}}


def untrained_mig(content: Content) -> float:
    """Look up MIG of the mean code before the first step."""
    return float(content["results"]["untrained"]["mig"]["score"])


def random_mig(content: Content) -> float:
    """Look up MIG of a random code."""
    return float(content["results"]["mig_random"]["score"])


def panel(content: Content) -> dict[str, float]:
    """Look up the dead shares by definition."""
    return dict(content["results"]["schedule"]["dead"])


class Returned(NamedTuple):
    """What became of units after the schedule, by the test images."""

    dead_before: int
    back: int
    """Of them active after the further epochs."""
    died: int
    """Active at the end of the schedule, but not after the further epochs."""
    dead_after: int


def returned(content: Content) -> Returned:
    """Count units from the end of the schedule to the end of the run."""
    before = [frequency > 0 for frequency in content["results"]["schedule"]["units"]["frequency"]]
    after = [frequency > 0 for frequency in content["results"]["units"]["frequency"]]
    pairs = list(zip(before, after, strict=True))
    return Returned(
        before.count(False), pairs.count((False, True)), pairs.count((True, False)),
        after.count(False),
    )  # fmt: skip


def alive_selectivity(units: Mapping[str, Sequence[float]]) -> list[float]:
    """List the selectivity of the units that were active at all."""
    pairs = zip(units["selectivity"], units["frequency"], strict=True)
    return [value for value, frequency in pairs if frequency > 0]


def median_selectivity(content: Content) -> float:
    """Compute the median selectivity at the end of the schedule; 0 without active units."""
    return median_of(content["results"]["schedule"]["units"])


def untrained_selectivity(content: Content) -> float:
    """Compute the median selectivity before the first step; 0 without active units."""
    return median_of(content["results"]["untrained"]["units"])


def median_of(units: Mapping[str, Sequence[float]]) -> float:
    """Compute the median selectivity of the units that were active at all; 0 without any."""
    values = alive_selectivity(units)
    return statistics.median(values) if values else 0.0


def alive_factors(units: Mapping[str, Sequence[float]], count: int) -> list[int]:
    """Count for each of count factors the active units that stand for it."""
    pairs = zip(units["factor"], units["frequency"], strict=True)
    chosen = [factor for factor, frequency in pairs if frequency > 0]
    return [chosen.count(factor) for factor in range(count)]


def records_by_k(content: Content, name: str) -> dict[int, Mapping[str, Any]]:
    """Find the last record of the schedule at each k that has a value of this name."""
    records = content["epochs"][: content["config"]["epochs"]]
    return {record["k"]: record for record in records if name in record}


# -- all cells -------------------------------------------------------------------------------------


class Measured:
    """The finished cells of a reproduction, by data set and arm.

    Raises:
        RunError: a cell lacks a measurement, or its parts do not fit together; names it.
    """

    def __init__(self, cells: Mapping[Cell, Content]) -> None:
        for cell, content in cells.items():
            _check_complete(cell, content)
        self.cells = dict(cells)
        self.datasets = list(dict.fromkeys(cell.dataset for cell in cells))
        run_arms = {cell.arm for cell in cells}
        self.arms = [arm for arm in ARMS if arm in run_arms]

    def of(self, dataset: str, arm: str) -> dict[int, Content]:
        """Find the cells of an arm by seed, in order; empty when there are none."""
        chosen = {
            cell.seed: content
            for cell, content in self.cells.items()
            if (cell.dataset, cell.arm) == (dataset, arm)
        }
        return dict(sorted(chosen.items()))

    def has(self, dataset: str, *arms: str) -> bool:
        """Tell whether each arm has a finished cell."""
        return all(self.of(dataset, arm) for arm in arms)

    def spread(self, dataset: str, arm: str, get: Getter) -> Spread | None:
        """Summarise a number over the seeds; None without a cell."""
        values = [get(content) for content in self.of(dataset, arm).values()]
        return spread(values) if values else None

    def known(self, dataset: str, arm: str, get: Getter) -> Spread:
        """Summarise a number over the seeds, where there are cells."""
        known = self.spread(dataset, arm, get)
        if known is None:
            raise KeyError(f"no cell of {dataset}, {arm}")
        return known

    def difference(self, dataset: str, arm: str, other: str, get: Getter) -> Difference | None:
        """Compare arm minus other, with its interval; None without cells of both."""
        one, two = self.spread(dataset, arm, get), self.spread(dataset, other, get)
        return None if one is None or two is None else welch(one, two)

    def columns(self, arms: Iterable[str]) -> list[tuple[str, str]]:
        """List arm and data set wherever there are cells, by arm."""
        return [
            (arm, dataset) for arm in arms for dataset in self.datasets if self.has(dataset, arm)
        ]

    def of_group(self, group: str) -> list[str]:
        """List the arms of a group that have cells."""
        return [arm for arm in self.arms if ARMS[arm].group == group]

    def verdict(self, dataset: str, cure: str) -> Verdict | None:
        """Decide about a cure, against Top-k; None without cells of both."""
        if not self.has(dataset, cure, UNCURED):
            return None

        def both(get: Getter) -> tuple[Spread, Spread]:
            return self.known(dataset, cure, get), self.known(dataset, UNCURED, get)

        dead = self.known(dataset, cure, never_active)
        return verdict(dead, both(at_end_of_schedule("reconstruction")), both(mig_score))

    def panel(self, dataset: str, arm: str) -> dict[str, Spread]:
        """Summarise the dead shares by definition over the seeds; empty without cells."""
        contents = list(self.of(dataset, arm).values())
        names = panel(contents[0]) if contents else {}
        return {name: spread(panel(content)[name] for content in contents) for name in names}


def has_mig_records(measured: Measured) -> bool:
    """Tell whether MIG was estimated during the training of an arm of the study."""
    return any(
        records_by_k(content, "mig")
        for cell, content in measured.cells.items()
        if cell.arm in STUDY
    )


def draws_matter(measured: Measured) -> bool:
    """Tell whether z lies before the sparse layer of an arm, so that drawing it matters."""
    return any(content["config"]["placement"] != "encoder" for content in measured.cells.values())


def threshold_range(shares: Mapping[str, Spread]) -> tuple[tuple[str, float], tuple[str, float]]:
    """Find the definitions with the smallest and the largest mean dead share, with it."""
    means = [(name, share.mean) for name, share in shares.items()]
    return min(means, key=lambda pair: pair[1]), max(means, key=lambda pair: pair[1])


def _check_complete(cell: Cell, content: Content) -> None:
    """Raise RunError where a cell lacks something."""

    def lacks(place: str, name: str) -> RunError:
        return RunError(
            f"cell {cell.name} lacks {name!r} in its {place}: it was run by another version; "
            "remove its results.json and run it again, which measures anew from its checkpoint "
            "(or its folder, to train anew)"
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
