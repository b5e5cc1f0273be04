"""The protocol of the VAE-SAE study, every choice in one dataclass.

Of arXiv 2603.18056 only the abstract is public. It gives a hybrid of VAE and sparse autoencoder,
dSprites and Shapes3D, 500 to 50 active neurons over 50 epochs, Top-k and L1, 100 more epochs, and
the shares of dead neurons. Where a field's source says "ours", the choice is declared by us.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...models.bottleneck import SPARSIFIERS
from ...models.vae_sae import PLACEMENTS
from ...training import SCHEDULES, LoopConfig
from ..configs import StudyConfig, backend_option, device_option, option

DATASETS = ("dsprites", "shapes3d")
SIDES = (64, 32)
GATED = "gated"
REVIVALS = ("none", "auxk", "resample", "homeostasis")
PRECISIONS = ("float32", "bfloat16")
LARGEST_SEED = 2**64 - 1  # of torch's generators
ABSTRACT = "abstract of arXiv 2603.18056"
OURS = "ours"
LIBRARY = "disentanglement_lib (Locatello et al. 2019)"
VALUES_OF_SOURCES = {"side": 64}
"""Where the default is another value than the source's."""


@dataclass(frozen=True)
class VAESAEConfig(StudyConfig):
    """Everything that decides a run. Fields marked free may change when a run is resumed."""

    dataset: str = option("dsprites", "images to train on", choices=DATASETS, source=ABSTRACT)
    data: str | None = option(
        None,
        "published file of the data set (.npz or HDF5); without it, images are rendered",
        metavar="FILE",
        free=True,
        path=True,
    )
    images: int = option(
        2560, "training images, a random subset; one epoch is one pass over them", source=OURS
    )
    side: int = option(
        32, "of the images in pixels; 32 is the mean of 2 x 2 pixels", choices=SIDES, source=LIBRARY
    )
    epochs: int = option(
        50, "passes over the training images; the k schedule spans them all", source=ABSTRACT
    )
    extra_epochs: int = option(
        0, "further passes with k as the schedule leaves it; the study's 100", source=ABSTRACT
    )
    batch_size: int = option(64, "images a step", source=LIBRARY)
    seed: int = option(0, "of the subset, the weights, the order of the images and the noise")
    learning_rate: float = option(1e-3, "of Adam", source="Chen et al. 2018")
    beta: float = option(1.0, "weight of the KL divergence", source=LIBRARY)
    placement: str = option(
        "encoder",  # where the units are the network's neurons, and where they die: see grid.py
        "of the sparse layer: z -> units -> decoder, z -> units -> z (code), or "
        "features -> units -> posterior (encoder)",
        choices=PLACEMENTS,
        source=OURS,
    )
    sparsifier: str = option(
        "topk",
        "k largest scores, k largest magnitudes, or ReLU with an L1 penalty that is steered so "
        "that on average k units are active",
        choices=SPARSIFIERS,
        source=ABSTRACT,
    )
    standardize: bool = option(
        False, "give the sparse layer's inputs zero mean and unit variance", source=OURS
    )
    tied: bool = option(
        False,
        "start the dictionary as the transposed first layer (placement code)",
        source="Gao et al. 2024",
    )
    schedule: str = option(
        "linear",
        "curve of k over the epochs; gated goes on when the held-out loss has recovered",
        choices=(*SCHEDULES, GATED),
        source=OURS,
    )
    warm_epochs: int = option(0, "epochs at k_start before the schedule begins", source=OURS)
    k_start: int = option(
        500, "k in the first epoch; ReLU may leave fewer units active", source=ABSTRACT
    )
    k_end: int = option(50, "k in the last epoch", source=ABSTRACT)
    units: int = option(500, "width of the sparse layer", source=ABSTRACT)
    latents: int = option(10, "width of the VAE's code z", source=LIBRARY)
    width: int = option(
        16, "channels of the outer convolutions; 32 is the width of the literature", source=OURS
    )
    revival: str = option(
        "none",
        "what brings dead units back: an auxiliary loss, new weights, or a rising bias",
        choices=REVIVALS,
        source=OURS,
    )
    dead_after: int = option(2560, "training images without firing that make a unit dead to it")
    eval_images: int = option(1024, "held-out images measured after each epoch")
    test_images: int = option(10000, "other held-out images, measured at the end", source=LIBRARY)
    mig_every: int = option(
        0,
        "epochs between two estimates of MIG on 4096 test images, five times as many after the "
        "schedule; 0 for none before the end",
    )
    precision: str = option(
        "float32", "of products and convolutions; weights are float32", choices=PRECISIONS
    )
    compile: bool = option(False, "compile the convolutions (torch.compile)")
    backend: str = backend_option()
    device: str = device_option()
    log_every: int = option(10, "steps between two logged steps")
    checkpoint_every: int = option(500, "steps between two checkpoints inside an epoch", free=True)
    progress: bool = option(True, "show a progress bar", free=True)

    def __post_init__(self) -> None:
        for name in (
            "images", "epochs", "batch_size", "units", "latents", "width", "dead_after",
            "eval_images", "test_images", "log_every", "checkpoint_every",
        ):  # fmt: skip
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("extra_epochs", "mig_every"):
            self._check(name, getattr(self, name) >= 0, "must be at least 0")
        self._check_choices()
        self._check("seed", 0 <= self.seed <= LARGEST_SEED, f"must lie in 0..{LARGEST_SEED}")
        # Both chains are false for NaN.
        fits = 0 < self.learning_rate < math.inf
        self._check("learning_rate", fits, "must be above 0 and finite")
        self._check("beta", 0 <= self.beta < math.inf, "must be at least 0 and finite")
        for name in ("k_start", "k_end"):
            fits = 1 <= getattr(self, name) <= self.units
            self._check(name, fits, f"must lie in 1..{self.units} (the number of units)")
        fits = 0 <= self.warm_epochs < self.epochs
        self._check("warm_epochs", fits, f"must lie in 0..{self.epochs - 1} (below epochs)")
        fits = not self.tied or self.placement == "code"
        self._check("tied", fits, f"needs placement code, which is {self.placement}")
        fits = self.revival == "none" or self.sparsifier != "l1"
        self._check("revival", fits, "must be none under l1, which has no selection to be kept out")

    def without_effect(self) -> dict[str, str]:
        """Name the fields that change nothing beside the values of others, and why."""
        return {"dead_after": "with --revival none"} if self.revival == "none" else {}

    @property
    def all_epochs(self) -> int:
        """Those of the schedule and the further ones."""
        return self.epochs + self.extra_epochs

    def loop(self) -> LoopConfig:
        """Choose what the training loop needs."""
        names = {item.name for item in fields(LoopConfig)}
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        return LoopConfig(**{**chosen, "epochs": self.all_epochs})

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Say where each choice that the study leaves open comes from, by field."""
        return {
            item.name: item.metadata["source"] for item in fields(cls) if "source" in item.metadata
        }


PRESETS: dict[str, dict[str, Any]] = {"default": {}}
