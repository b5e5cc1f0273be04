"""The protocol of the Sparling study, every choice in one dataclass.

Sources: Gupta et al., Sparling (arXiv 2302.01976), the authors' public code, and, where a field's
source says "ours", a choice declared by us. Time is counted in training samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...training import LoopConfig
from ..configs import StudyConfig, backend_option, device_option, option

DOMAINS = ("tiny", "digit-circle", "latex", "audio")
BOTTLENECKS = ("sparsity", "l1", "kl", "none")
PRECISIONS = ("float32", "bfloat16")
LARGEST_SEED = 2**63 - 1  # of the streams of samples
PAPER = "arXiv 2302.01976"
CODE = "the authors' public code"
OURS = "ours"


@dataclass(frozen=True)
class SparlingConfig(StudyConfig):
    """Everything that decides a run. Fields marked free may change when a run is resumed."""

    domain: str = option("tiny", "what the inputs show", choices=DOMAINS, source=PAPER)
    data: str | None = option(
        None,
        "folder of the AudioMNIST recordings (domain audio); without it, digits are synthesised",
        metavar="FOLDER",
        free=True,
        path=True,
    )
    samples: int = option(300_000, "training samples in all; each is seen once", source=OURS)
    batch_size: int = option(32, "samples a step", source=OURS)
    seed: int = option(0, "of the weights and of the stream of training samples")
    bottleneck: str = option(
        "sparsity",
        "thresholds (sparsity), a penalty on a ReLU (l1) or on the divergence of a sigmoid's mean "
        "(kl), or nothing (none)",
        choices=BOTTLENECKS,
        source=PAPER,
    )
    penalty: float = option(0.0, "weight of the penalty of l1 and kl", source=PAPER)
    per_channel: bool = option(True, "a threshold for each channel, or one for all", source=PAPER)
    normalize: bool = option(True, "batch normalisation before the threshold", source=PAPER)
    affine: bool = option(True, "a trained scale and shift in that normalisation", source=CODE)
    momentum: float = option(0.05, "of the thresholds; published 0.1", source=OURS)
    accumulate: int = option(
        0, "motifs to be expected before a threshold moves; 0 for every batch", source=CODE
    )
    density_start: float = option(0.1, "share of active positions at first", source=OURS)
    density_end: float = option(
        1.1, "final density, in multiples of the domain's own", source=PAPER
    )
    density_factor: float = option(0.75, "of the density at each step down", source=CODE)
    target_fall: float = option(
        1e-6, "of the accuracy that allows a step, per sample; published 1e-7", source=OURS
    )
    validate_every: int = option(5_000, "samples between two validations", source=OURS)
    validation_samples: int = option(1_000, "of a validation", source=OURS)
    test_samples: int = option(10_000, "measured at the end", source=PAPER)
    learning_rate: float = option(2e-3, "of Adam", source=OURS)
    final_share: float = option(
        0.3, "share of the samples over which the rate falls linearly, at the end", source=OURS
    )
    final_rate: float = option(0.05, "of the learning rate, at the very end", source=OURS)
    precision: str = option(
        "float32", "of products and convolutions; weights are float32", choices=PRECISIONS
    )
    backend: str = backend_option()
    device: str = device_option()
    log_every: int = option(100, "steps between two logged steps")
    checkpoint_every: int = option(
        2_000, "steps between two checkpoints inside an epoch", free=True
    )
    progress: bool = option(True, "show a progress bar", free=True)

    def __post_init__(self) -> None:
        for name in (
            "samples", "batch_size", "validate_every", "validation_samples", "test_samples",
            "log_every", "checkpoint_every",
        ):  # fmt: skip
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check_choices()
        self._check("seed", 0 <= self.seed <= LARGEST_SEED, f"must lie in 0..{LARGEST_SEED}")
        # These chains are false for NaN.
        for name in ("momentum", "density_start"):
            self._check(name, 0 < getattr(self, name) <= 1, "must be above 0 and at most 1")
        for name in ("learning_rate", "density_end"):
            fits = 0 < getattr(self, name) < math.inf
            self._check(name, fits, "must be above 0 and finite")
        for name in ("penalty", "target_fall"):
            fits = 0 <= getattr(self, name) < math.inf
            self._check(name, fits, "must be at least 0 and finite")
        self._check("density_factor", 0 < self.density_factor < 1, "must be above 0 and below 1")
        self._check("final_share", 0 <= self.final_share <= 1, "must lie in 0..1")
        self._check("final_rate", 0 < self.final_rate <= 1, "must be above 0 and at most 1")
        self._check("accumulate", self.accumulate >= 0, "must be at least 0")
        fits = self.samples % self.validate_every == 0
        self._check("samples", fits, f"must be a multiple of {self.validate_every} (validations)")
        fits = self.penalty == 0 or self.bottleneck in ("l1", "kl")
        self._check("penalty", fits, f"needs bottleneck l1 or kl, which is {self.bottleneck}")
        fits = self.data is None or self.domain == "audio"
        self._check("data", fits, f"needs domain audio, which is {self.domain}")

    def without_effect(self) -> dict[str, str]:
        """Name the fields that change nothing beside the values of others, and why."""
        reasons: dict[str, str] = {}
        if self.bottleneck != "sparsity":
            annealed = (
                "per_channel", "normalize", "affine", "momentum", "accumulate", "density_start",
                "density_factor", "target_fall",
            )  # fmt: skip
            reasons |= dict.fromkeys(annealed, f"with --bottleneck {self.bottleneck}")
        elif not self.normalize:
            reasons["affine"] = "with --no-normalize"
        if self.bottleneck in ("l1", "none"):
            reasons["density_end"] = f"with --bottleneck {self.bottleneck}"
        if self.final_share == 0:
            reasons["final_rate"] = "with --final-share 0"
        return reasons

    @property
    def all_epochs(self) -> int:
        """Validations; what lies between two is an epoch."""
        return self.samples // self.validate_every

    def rate(self, epoch: int) -> float:
        """Compute the learning rate of an epoch."""
        left = 1 - epoch / self.all_epochs
        share = min(1.0, left / self.final_share) if self.final_share else 1.0
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * share)

    def loop(self) -> LoopConfig:
        """Choose what the training loop needs."""
        names = {item.name for item in fields(LoopConfig)}
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        return LoopConfig(**{**chosen, "epochs": self.all_epochs})

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Say where each choice comes from, by field."""
        return {
            item.name: item.metadata["source"] for item in fields(cls) if "source" in item.metadata
        }


_PUBLISHED: dict[str, Any] = {
    "samples": 6_000_000,
    "density_start": 0.5,
    "momentum": 0.1,
    "target_fall": 1e-7,
    "validate_every": 20_000,
    "validation_samples": 10_000,
}
# In some of the published experiments.
_ALSO_PUBLISHED: dict[str, tuple[Any, ...]] = {
    "samples": (60_000_000,),
    "batch_size": (8, 10),
    "learning_rate": (1e-5,),
    "affine": (False,),
    "accumulate": (10,),
}
_ON_A_GPU: dict[str, Any] = {**_PUBLISHED, "learning_rate": 2e-4, "precision": "bfloat16"}


def source_of(name: str, config: Mapping[str, Any]) -> str:
    """Say where the value of a field comes from."""
    value = config[name]
    if (name, value) == ("domain", "tiny"):
        return OURS
    if (name, value) in _PUBLISHED.items() or value in _ALSO_PUBLISHED.get(name, ()):
        return CODE
    field = SparlingConfig.__dataclass_fields__[name]
    return str(field.metadata["source"]) if value == field.default else OURS


# Batches larger than the published ones of 10 and 8, with a rate larger than 1e-5: for one GPU.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digit-circle": {**_ON_A_GPU, "domain": "digit-circle", "batch_size": 256},
    "latex": {
        **_ON_A_GPU, "domain": "latex", "batch_size": 64, "affine": False, "accumulate": 10,
    },
    "audio": {
        **_ON_A_GPU, "domain": "audio", "batch_size": 64, "affine": False, "accumulate": 10,
        "samples": 60_000_000,
    },
}  # fmt: skip
