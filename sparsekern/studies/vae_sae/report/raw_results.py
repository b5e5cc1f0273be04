"""The raw results of a reproduction as CSV: a row for a cell, a unit, an epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .. import grid
from ..config import OURS, VALUES_OF_SOURCES, VAESAEConfig
from ..grid import Cell
from ..images import SETS
from .activity import (
    describe_cut,
    phase_of_units,
    phase_shares,
    silent_share,
    silent_since_before_cut,
)
from .measurements import Content, Measured, returned

FACTORS = {name: images.factors.names for name, images in SETS.items()}
OWN_COLUMNS = ("dataset", "data", "seed", "progress")
MIGS = ("mig", "mig_code", "mig_monte_carlo")

Row = dict[str, Any]


def cell_rows(measured: Measured, asked: Mapping[str, Any]) -> list[Row]:
    """List every scalar of each cell.

    Shares are 0..1; reconstruction and kl are nats per image; columns that begin with "after_" are
    measured after the further epochs.
    """
    return [_cell_row(cell, content, asked) for cell, content in measured.cells.items()]


def _cell_row(cell: Cell, content: Content, asked: Mapping[str, Any]) -> Row:
    """List every scalar of a cell."""
    results = content["results"]
    row: Row = {"dataset": cell.dataset, "arm": cell.arm, "seed": cell.seed}
    row |= _measurement_row("", results["schedule"]) | _measurement_row("after_", results)
    row |= _measurement_row("untrained_", results["untrained"])
    row |= _gap_row("mig_random", results["mig_random"])
    row |= {
        f"died_{phase.replace(' ', '_')}": share for phase, share in phase_shares(content).items()
    }
    began = describe_cut(content)
    row |= {
        "silent": silent_share(content),
        "silent_since_before_cut": silent_since_before_cut(content),
    }
    row |= {
        "cut_epoch": "" if began.epoch is None else began.epoch,
        "cut_k": "" if began.k is None else began.k,
        "l0_first_epoch": began.first,
        "l0_before_cut": began.before,
    }
    change_after = returned(content)
    row |= {
        "units": content["config"]["units"],
        "back": change_after.back,
        "died_after": change_after.died,
    }
    row |= {name: results[name] for name in ("seconds", "images_per_second", "device", "data")}
    row["backends"] = " ".join(
        f"{name}={backend}" for name, backend in sorted(results["backends"].items())
    )
    row["settings"] = " ".join(
        f"{name}={value}" for name, value in differing(cell, content, asked).items()
    )
    return row


def _measurement_row(prefix: str, facts: Mapping[str, Any]) -> Row:
    """List measurements with a prefix before their names."""
    row: Row = {}
    for name in ("k", "reconstruction", "kl", "l0"):
        if name in facts:
            row[prefix + name] = facts[name]
    for name, share in facts["dead"].items():
        row[f"{prefix}dead_{name}"] = share
    for name, share in facts.get("dead_sampled", {}).items():
        row[f"{prefix}dead_sampled_{name}"] = share
    for name in MIGS:
        if name in facts:
            row |= _gap_row(prefix + name, facts[name])
    return row


def _gap_row(name: str, gap: Mapping[str, Any]) -> Row:
    """List a gap with its interval."""
    ends = {f"{name}_{end}": gap[end] for end in ("low", "high") if end in gap}
    return {name: gap["score"]} | ends


def differing(cell: Cell, content: Content, asked: Mapping[str, Any]) -> Row:
    """Find the settings in which a cell differs from the protocol of this reproduction."""
    protocol = grid.cell_config(
        Cell(cell.dataset, "topk", cell.seed), asked["preset"], asked["overrides"], None
    )
    return {
        name: value
        for name, value in content["config"].items()
        if name not in OWN_COLUMNS and value != getattr(protocol, name, None)
    }


def unit_rows(measured: Measured) -> list[Row]:
    """List what is known of each unit, after all epochs.

    Frequency (share of the test images), mean activation, selectivity, factor, and its death.
    last_active_epoch is that of the schedule, counts from 1 and is 0 for a unit that was active on
    the held-out images after none; it and phase are empty for a unit that was active after the
    last. last_active_epoch_of_run is the same over all epochs.
    """
    rows = []
    for cell, content in measured.cells.items():
        results, names = content["results"], FACTORS[cell.dataset]
        units = results["units"]
        before = results["schedule"]["units"]["frequency"]
        phase = phase_of_units(content)
        ends = zip(results["death_epoch"], results["death_epoch_after"], strict=True)
        for unit, (last, last_of_run) in enumerate(ends):
            rows.append(
                {
                    "dataset": cell.dataset,
                    "arm": cell.arm,
                    "seed": cell.seed,
                    "unit": unit,
                    "frequency": units["frequency"][unit],
                    "mean": units["mean"][unit],
                    "selectivity": units["selectivity"][unit],
                    "factor": names[units["factor"][unit]],
                    "frequency_at_end_of_schedule": before[unit],
                    "last_active_epoch": "" if last is None else last + 1,
                    "last_active_epoch_of_run": "" if last_of_run is None else last_of_run + 1,
                    "phase": phase[unit] or "",
                }
            )
    return rows


def epoch_rows(measured: Measured) -> list[Row]:
    """List the scalars of each epoch record; epochs count from 1."""
    rows = []
    for cell, content in measured.cells.items():
        for record in content["epochs"]:
            scalars = {
                name: value for name, value in record.items() if not isinstance(value, dict | list)
            }
            scalars.pop("kind", None)
            scalars["epoch"] += 1
            rows.append({"dataset": cell.dataset, "arm": cell.arm, "seed": cell.seed, **scalars})
    return rows


def protocol_rows(
    configs: Sequence[Mapping[str, Any]], arm: str
) -> list[tuple[str, str, str, str]]:
    """List field, value, help and source of every field that decides a run of an arm.

    Values that differ between the configs are joined by commas.

    A field's source is that of its default, and of what an arm of the study sets; any other value
    is ours.
    """
    sources = VAESAEConfig.sources()
    study = grid.ARMS[arm].changes if grid.ARMS[arm].group == "study" else {}
    rows = []
    for item in dataclasses.fields(VAESAEConfig):
        if item.metadata.get("free"):
            continue
        values = dict.fromkeys(str(config[item.name]) for config in configs)
        text = item.metadata["help"]
        sourced = VALUES_OF_SOURCES.get(item.name, item.default)
        known = {str(sourced), str(study.get(item.name, sourced))}
        source = sources.get(item.name, "")
        if item.name not in OWN_COLUMNS and not known.issuperset(values):
            source = OURS
        rows.append((item.name, ", ".join(values), text, source))
    return rows
