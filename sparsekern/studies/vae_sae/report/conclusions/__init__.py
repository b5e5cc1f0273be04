"""What can be concluded from the cells of a reproduction, in sentences chosen by their numbers.

A difference between arms is stated with its 95 % interval (Welch's t over the seeds), and called
one where the interval lies on one side of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..measurements import Measured
from ..names import SETS
from . import collapse, comparisons, interpretability


def conclusions(measured: Measured) -> dict[str, list[str]]:
    """Write sentences by what they are about: each data set, then the claims and the cures."""
    sentences = {
        SETS[dataset]: list(_of_dataset(measured, dataset)) for dataset in measured.datasets
    }
    sentences["The study's orderings, and the cures"] = [
        *comparisons.orderings(measured),
        *comparisons.cures(measured),
    ]
    return {title: texts for title, texts in sentences.items() if texts}


def _of_dataset(measured: Measured, dataset: str) -> Iterator[str]:
    """Say everything about a data set."""
    parts: tuple[Callable[[Measured, str], Iterator[str]], ...] = (
        collapse.active_units,
        collapse.without_sparsification,
        collapse.by_part,
        collapse.fixed,
        collapse.steering,
        collapse.further_epochs,
        interpretability.mig,
        interpretability.selectivity,
        interpretability.definitions,
        interpretability.drawn_codes,
    )
    for part in parts:
        for text in part(measured, dataset):
            yield text[0].upper() + text[1:]
