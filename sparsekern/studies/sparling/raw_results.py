"""The raw results of a reproduction, as rows of CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .grid import Cell

SHARES = ("fpe", "fne", "ce", "e2ee")


def cell_rows(cells: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List one row for each cell."""
    rows = []
    for cell, value in cells.items():
        results = value["results"]
        shares = {
            f"{name}{end and '_' + end}": results[name][end or "value"]
            for name in (*SHARES, "exact", "perturbation")
            for end in ("", "low", "high")
        }
        plain = (
            "validation_exact", "density", "relative_density", "annealed_at", "samples_per_second",
            "seconds", "device",
        )  # fmt: skip
        rows.append(
            {
                "arm": cell.arm,
                "seed": cell.seed,
                **shares,
                "perturbation_inputs": results["perturbation"]["inputs"],
                **{n: results[n] for n in plain},
            }
        )
    return rows


def epoch_rows(cells: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List one row for each epoch of each cell."""
    names = (
        "learning_rate", "density", "loss", "accuracy", "target", "fpe", "fne", "ce",
        "relative_density",
    )  # fmt: skip
    return [
        {
            "arm": cell.arm,
            "seed": cell.seed,
            "samples": (epoch["epoch"] + 1) * value["config"]["validate_every"],
            **{name: epoch.get(name) for name in names},
        }
        for cell, value in cells.items()
        for epoch in value["epochs"]
    ]
