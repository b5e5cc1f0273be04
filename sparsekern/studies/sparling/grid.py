"""The cells of the reproduction: arm x seed, each a run of its own.

sparling      the bottleneck with thresholds, annealed
l1-*, kl-*    what it is compared with: penalties of some weights, at equal samples
ablations     one threshold for all channels, no normalisation, no annealing, no bottleneck
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ...data.motifs.registry import motif_domain
from ..reproduction import calls_of, parsed_settings
from .config import PRESETS as _CONFIGS
from .config import SparlingConfig
from .task import CHANNELS


class Arm(NamedTuple):
    """One way to train."""

    group: str
    """study, l1, kl or ablation."""
    text: str
    """What it is, for the report."""
    changes: dict[str, Any]
    """Fields of the config that differ from the protocol's."""


L1_WEIGHTS = (1, 3, 10, 30)
KL_WEIGHTS = (1, 10, 100)
# Replaced by the domain's final density.
FINAL = "final"
ARMS: dict[str, Arm] = {
    "sparling": Arm("study", "thresholds per channel, annealed", {}),
    **{
        f"l1-{weight}": Arm(
            "l1", f"L1 penalty of weight {weight}", {"bottleneck": "l1", "penalty": float(weight)}
        )
        for weight in L1_WEIGHTS
    },
    **{
        f"kl-{weight}": Arm(
            "kl", f"KL penalty of weight {weight}", {"bottleneck": "kl", "penalty": float(weight)}
        )
        for weight in KL_WEIGHTS
    },
    "one-threshold": Arm(
        "ablation", "a single threshold for all channels (ST)", {"per_channel": False}
    ),
    "no-norm": Arm("ablation", "no batch normalisation", {"normalize": False}),
    "no-annealing": Arm("ablation", "the final density from the start", {"density_start": FINAL}),
    "no-bottleneck": Arm("ablation", "batch normalisation and ReLU only", {"bottleneck": "none"}),
}
GROUPS = {
    "study": ("sparling",),
    "l1": tuple(name for name, arm in ARMS.items() if arm.group == "l1"),
    "kl": tuple(name for name, arm in ARMS.items() if arm.group == "kl"),
    "ablations": tuple(name for name, arm in ARMS.items() if arm.group == "ablation"),
    "all": tuple(ARMS),
}
PRESETS = {"tiny" if name == "default" else name: preset for name, preset in _CONFIGS.items()}
# Seeds of the study's arm by default, and of the others at most.
SEEDS = {"tiny": 6, "digit-circle": 1, "latex": 1, "audio": 1}
OTHER_SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-{self.seed}"


def cells(arms: Iterable[str], seeds: int) -> list[Cell]:
    """List the cells of a grid, in the order of the arms.

    Arms beside the study's have at most three seeds.
    """
    wanted = list(arms)
    counts = {
        arm: seeds if ARMS[arm].group == "study" else min(seeds, OTHER_SEEDS) for arm in wanted
    }
    return [Cell(arm, seed) for arm in ARMS if arm in wanted for seed in range(counts[arm])]


def asked_cells(asked: Mapping[str, Any]) -> list[Cell]:
    """List the cells of all calls that asked for this reproduction, in the order of one grid."""
    wanted = {cell for call in calls_of(asked) for cell in cells(call["arms"], call["seeds"])}
    return [cell for cell in cells(asked["arms"], asked["seeds"]) if cell in wanted]


def cell_config(
    cell: Cell, preset: str, overrides: Mapping[str, Any], data: str | None
) -> SparlingConfig:
    """Make the config of a cell: the preset, then the overrides, then what the arm changes.

    Raises:
        ValueError: the settings do not fit together.
    """
    defaults = {item.name: item.default for item in fields(SparlingConfig)}
    base = {**defaults, **PRESETS[preset], **overrides, **ARMS[cell.arm].changes}
    if base["density_start"] == FINAL:
        domain = base["domain"]
        base["density_start"] = base["density_end"] * motif_domain(domain).density(CHANNELS[domain])
    return SparlingConfig(**{**base, "seed": cell.seed, "data": data, "progress": False})


def parsed_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE pairs as fields of the config.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a field that the grid sets.
    """
    kinds = typing.get_type_hints(SparlingConfig)
    taken = {
        "domain", "data", "seed", "progress", "bottleneck", "penalty", "per_channel", "normalize",
    }  # fmt: skip
    return parsed_settings(settings, kinds, taken)
