"""The cells of the reproduction: data set x arm x seed, each a run of its own.

arms of the study       topk, l1, each with 100 more epochs after the schedule
controls                dense: never sparsified; fixed: k = 50 from the first epoch
cures                   topk, and something that keeps units alive or brings them back
placements, schedules   topk with one choice of the protocol made otherwise
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, NamedTuple

from ..reproduction import calls_of, parsed_settings
from .config import VAESAEConfig

EXTRA_EPOCHS = 100


class Arm(NamedTuple):
    """One way to train."""

    group: str
    """study, control, cure, placement or schedule."""
    text: str
    """What it is, for the report."""
    changes: dict[str, Any]
    """Fields of the config that differ from the protocol's, or functions of the protocol's fields
    that give them."""


ARMS: dict[str, Arm] = {
    "topk": Arm("study", "Top-k, k from 500 to 50", {"extra_epochs": EXTRA_EPOCHS}),
    "l1": Arm(
        "study",
        "L1, steered so that L0 follows the same schedule",
        {"sparsifier": "l1", "extra_epochs": EXTRA_EPOCHS},
    ),
    "dense": Arm(
        "control",
        "never sparsified",
        {"k_start": itemgetter("units"), "k_end": itemgetter("units")},
    ),
    "fixed": Arm("control", "the final k from the first epoch", {"k_start": itemgetter("k_end")}),
    "standardize": Arm("cure", "standardized input of the sparse layer", {"standardize": True}),
    "auxk": Arm("cure", "auxiliary loss of dead units (AuxK on scores)", {"revival": "auxk"}),
    "resample": Arm("cure", "dead units get new weights", {"revival": "resample"}),
    "homeostasis": Arm(
        "cure",
        "biases of units that are silent for a fifth of an epoch rise",
        {"revival": "homeostasis", "dead_after": lambda protocol: max(1, protocol["images"] // 5)},
    ),
    "warm": Arm(
        "cure",
        "a fifth of the epochs at the first k, then the schedule",
        {"warm_epochs": lambda protocol: protocol["epochs"] // 5},
    ),
    "cured": Arm(
        "cure",
        "standardized input and new weights for dead units",
        {"standardize": True, "revival": "resample"},
    ),
    "magnitude": Arm("schedule", "Top-k by magnitude", {"sparsifier": "magnitude"}),
    "cosine": Arm("schedule", "cosine schedule", {"schedule": "cosine"}),
    "geometric": Arm("schedule", "geometric schedule", {"schedule": "geometric"}),
    "step": Arm("schedule", "ten steps", {"schedule": "step"}),
    "gated": Arm("schedule", "validation-gated schedule", {"schedule": "gated"}),
    "decoder": Arm("placement", "sparse layer between z and decoder", {"placement": "decoder"}),
    "code": Arm("placement", "sparse layer from z to z", {"placement": "code"}),
    "tied": Arm(
        "placement",
        "sparse layer from z to z, dictionary started as the transposed first layer",
        {"placement": "code", "tied": True},
    ),
}
STUDY = ("topk", "l1")
CONTROLS = ("dense", "fixed")
CURES = tuple(name for name, arm in ARMS.items() if arm.group == "cure")

# Of the three places this is where an autoencoder of a network's activations sits, and where the
# neurons are those of the network; the arms "decoder" and "code" show what the choice changes.
PLACEMENT = "encoder"
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "placement": PLACEMENT,
        "side": 32,
        "images": 2560,
        "dead_after": 2560,
        "mig_every": 5,
    },
    "full": {
        "placement": PLACEMENT,
        "side": 64,
        "images": 716_800,
        "eval_images": 10_240,
        "test_images": 10_240,
        "batch_size": 1024,
        "width": 32,
        "dead_after": 716_800,
        "mig_every": 5,
        "precision": "bfloat16",
        "compile": True,
        "log_every": 100,
        "checkpoint_every": 100_000,
    },
}
# Where a set has fewer images than a preset asks for.
FEWER: dict[tuple[str, str], dict[str, Any]] = {
    ("full", "shapes3d"): {"images": 459_520, "dead_after": 459_520},
}
SEEDS = {"small": 2, "full": 3}


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    dataset: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.dataset}-{self.arm}-{self.seed}"


def cells(datasets: Iterable[str], arms: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    """List the cells of a grid, those of the study first, then by arm.

    So that a report of an interrupted reproduction says as much as can be said.
    """
    wanted = list(arms)
    order = [*(arm for arm in ARMS if arm in wanted)]
    return [Cell(dataset, arm, seed) for arm in order for seed in seeds for dataset in datasets]


def asked_cells(asked: Mapping[str, Any]) -> list[Cell]:
    """List the cells of all calls that asked for this reproduction, in the order of one grid."""
    wanted = {
        cell
        for call in calls_of(asked)
        for cell in cells(call["datasets"], call["arms"], range(call["seeds"]))
    }
    grid = cells(asked["datasets"], asked["arms"], range(asked["seeds"]))
    return [cell for cell in grid if cell in wanted]


def cell_config(
    cell: Cell, preset: str, overrides: Mapping[str, Any], data: str | None
) -> VAESAEConfig:
    """Make the config of a cell: the preset, then the overrides, then what the arm changes.

    Raises:
        ValueError: the settings do not fit together.
    """
    defaults = {item.name: item.default for item in fields(VAESAEConfig)}
    preset_changes = {**PRESETS[preset], **FEWER.get((preset, cell.dataset), {})}
    base = {**defaults, **preset_changes, **overrides}
    if "images" in overrides and "dead_after" not in overrides:
        base["dead_after"] = base["images"]  # an epoch, as in the presets
    for name, value in ARMS[cell.arm].changes.items():
        # Extra epochs are a length, which may be another one; anything else makes the arm.
        if name != "extra_epochs" or name not in overrides:
            base[name] = value(base) if callable(value) else value
    if ARMS[cell.arm].group != "study":
        base["extra_epochs"] = 0
    return VAESAEConfig(
        **{**base, "dataset": cell.dataset, "seed": cell.seed, "data": data, "progress": False}
    )


def parsed_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE pairs as fields of the config.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a field that the grid sets.
    """
    # The last two are what makes an arm.
    taken = {"dataset", "data", "seed", "progress", "sparsifier", "revival"}
    return parsed_settings(settings, typing.get_type_hints(VAESAEConfig), taken)
