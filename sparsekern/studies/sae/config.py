"""The settings of training a sparse autoencoder, and what they must satisfy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ...training import LoopConfig
from ..configs import SettingError, StudyConfig, backend_option, check_finite, device_option, option

# Latents that have not fired in a 20th of the training are helped by the auxiliary loss.
PARTS_OF_TRAINING = 20
MOST_DEAD_AFTER = 10_000_000

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # 512 directions of 128 features, 4 of them in a token: what `data activations synthetic` makes
    "synthetic": {
        "latents": 512,
        "k": 4,
        "batch_size": 1024,
        "epochs": 6,
        "learning_rate": 3e-3,
        "auxk": 64,
        "auxk_weight": 0.25,
        "dead_after": 100_000,
    },
}


@dataclass(frozen=True)
class SAEConfig(StudyConfig):
    """Everything that decides a run. Fields marked free may change when a run is resumed."""

    activations: tuple[str, ...] = option(
        (),
        "files of activations: .h5, .hdf5, .npy or .safetensors",
        metavar="FILE",
        free=True,
        path=True,
    )
    dataset: str = option("activations", "name of the dataset in HDF5 files", metavar="NAME")
    nonfinite: str = option(
        "refuse",
        "what to do about rows with NaN or infinities",
        choices=("refuse", "skip"),
        free=True,
    )
    normalize: str = option(
        "none",
        "multiply rows, so that their norm is the root of their width: each by itself (token), or "
        "all by one factor, on average (dataset)",
        choices=("none", "token", "dataset"),
    )
    outlier_filter: float = option(
        0.0, "leave out rows longer than so many times the median norm; 0 leaves out none"
    )
    latents: int = option(0, "width of the sparse layer; 0 takes 8 times that of the activations")
    activation: str = option(
        "topk", "what makes scores sparse", choices=("topk", "batchtopk", "jumprelu", "relu")
    )
    k: int = option(32, "active latents per token (topk; on average batchtopk and jumprelu)")
    target_l0: float = option(
        0.0,
        "active latents per token that jumprelu is steered to; 0 takes k, or, where "
        "--sparsity-weight is given, a loss on their number",
    )
    groups: int = option(1, "groups of latents that topk selects in separately")
    threshold: float | None = option(
        None, "first threshold of jumprelu; by default one that lets as many be active as wanted"
    )
    bandwidth: float | None = option(
        None, "width of the kernel of jumprelu's gradient; by default half of each threshold"
    )
    sparsity_weight: float | None = option(
        None,
        "weight of the loss on active latents (jumprelu) or their values (relu, which needs one); "
        "by default 1 for jumprelu's distance from its target, and 0 otherwise",
    )
    sparsity_warmup: float = option(
        0.1, "share of the training over which that weight rises, without a target"
    )
    prefixes: tuple[int, ...] = option(
        (), "numbers of first latents that reconstruct on their own (Matryoshka)", metavar="N"
    )
    k_start: int = option(0, "active latents at the start of the schedule of k; 0 takes k")
    anneal: float = option(0.5, "share of the training over which k falls from k_start to k")
    epochs: int = option(
        1, "passes over the activations; more of them extend a run that is resumed", extends=True
    )
    batch_size: int = option(4096, "tokens a step")
    micro_batch: int = option(
        0, "tokens computed at a time: less memory for the same step; 0 takes the whole batch"
    )
    learning_rate: float = option(1e-3, "of Adam, at its highest")
    warmup: float = option(0.02, "share of the training over which the learning rate rises")
    decay: float = option(0.3, "share of the training over which it falls to zero")
    auxk: int | None = option(
        None,
        "dead latents per token in the auxiliary loss; 0 leaves it out; by default as many as are "
        "active, and at most half the width of the activations",
    )
    auxk_weight: float = option(1 / 32, "weight of the auxiliary loss")
    multi_k: int = option(0, "active latents of the second reconstruction; 0 leaves it out")
    multi_weight: float = option(1 / 8, "weight of the second reconstruction")
    dead_after: int | None = option(
        None,
        "tokens without firing after which a latent is dead; by default a 20th of the training, "
        "and at most 10 million",
    )
    revival: float = option(
        3.0,
        "how often over, in the whole training, the bias of a dead latent would rise by the "
        "smallest active value if it never fired; 0 leaves it out",
    )
    init_from: str | None = option(
        None, "folder of a run whose weights this one begins with", metavar="RUN", path=True
    )  # fmt: skip
    tied: bool = option(False, "one matrix for encoder and dictionary")
    scale_scores: bool = option(False, "scores scaled by the norms of the dictionary's rows")
    autocast: bool = option(False, "compute in bfloat16, with float32 parameters")
    seed: int = option(0, "of the weights and of the order of the tokens")
    eval_tokens: int = option(
        16384, "tokens that are not trained on, but measured; at most a tenth of all"
    )
    eval_activations: tuple[str, ...] = option(
        (), "files whose tokens are measured, instead of tokens held out", metavar="FILE",
        free=True, path=True,
    )  # fmt: skip
    buffer_rows: int = option(65536, "tokens shuffled together; two such buffers are in memory")
    backend: str = backend_option()
    device: str = device_option()
    log_every: int = option(10, "steps between two logged steps")
    checkpoint_tokens: int = option(4_000_000, "tokens between two checkpoints", free=True)
    progress: bool = option(True, "show a progress bar", free=True)

    def __post_init__(self) -> None:
        # JSON has lists
        object.__setattr__(self, "activations", tuple(self.activations))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        object.__setattr__(self, "eval_activations", tuple(self.eval_activations))
        self._check("activations", bool(self.activations), "must name at least one file")
        for name in (
            "k", "groups", "epochs", "batch_size", "dead_after", "eval_tokens", "buffer_rows",
            "log_every", "checkpoint_tokens",
        ):  # fmt: skip
            self._check_given(name, lambda value: value >= 1, "must be at least 1")
        for name in (
            "latents", "k_start", "micro_batch", "auxk", "multi_k", "sparsity_weight",
            "target_l0", "outlier_filter", "revival",
        ):  # fmt: skip
            self._check_given(name, lambda value: value >= 0, "must be at least 0")
        self._check_choices()
        for item in fields(self):
            check_finite(item.name, getattr(self, item.name))
        self._check("seed", 0 <= self.seed < 2**63, "must lie in 0..2^63 - 1")
        self._check("learning_rate", self.learning_rate > 0, "must be above 0")
        for name in ("threshold", "bandwidth"):
            self._check_given(name, lambda value: value > 0, "must be above 0")
        filters = self.outlier_filter == 0 or self.outlier_filter > 1
        self._check("outlier_filter", filters, "must be 0 or above 1")
        self._check_activation()
        for name in ("anneal", "warmup", "decay", "sparsity_warmup"):
            self._check(name, 0 <= getattr(self, name) <= 1, "must lie in 0..1")

    def _check_given(self, name: str, fits: Callable[[Any], bool], condition: str) -> None:
        """Check a field that may be None, which stands for its default."""
        value = getattr(self, name)
        self._check(name, value is None or fits(value), condition)

    def _check_activation(self) -> None:
        """Check options that only some activations have."""
        penalized = self.activation in ("jumprelu", "relu")
        self._check(
            "sparsity_weight", penalized or not self.sparsity_weight,
            f"must be 0 with --activation {self.activation}",
        )  # fmt: skip
        for name in ("target_l0", "threshold", "bandwidth"):
            self._check(
                name, self.activation == "jumprelu" or not getattr(self, name),
                f"must not be given with --activation {self.activation}",
            )  # fmt: skip
        self._check(
            "groups", self.activation == "topk" or self.groups == 1,
            f"must be 1 with --activation {self.activation}",
        )  # fmt: skip
        self._check(
            "k_start", not penalized or self.k_start == 0,
            f"must be 0 with --activation {self.activation}, which has no k",
        )  # fmt: skip
        if self.activation == "relu":
            self._check(
                "sparsity_weight", bool(self.sparsity_weight),
                "must be given and above 0 with --activation relu: without it, nothing is sparse",
            )  # fmt: skip
        if self.activation == "jumprelu":
            self._check(
                "sparsity_weight", self.sparsity_weight != 0,
                "must be above 0 with --activation jumprelu: without it, nothing is sparse",
            )  # fmt: skip
        for name in ("k", "k_start"):
            divides = getattr(self, name) % self.groups == 0
            self._check(name, divides, f"must be a multiple of groups = {self.groups}")

    @property
    def has_k(self) -> bool:
        """Whether the activation keeps a given number k of latents."""
        return self.activation in ("topk", "batchtopk")

    @property
    def steered_l0(self) -> float | None:
        """The number of active latents that jumprelu is steered to, if it is."""
        if self.activation != "jumprelu" or (self.sparsity_weight and not self.target_l0):
            return None
        return self.target_l0 or self.k

    @property
    def weight_of_sparsity(self) -> float:
        """The weight of the sparsity loss, with its default."""
        if self.sparsity_weight is not None:
            return self.sparsity_weight
        return 0.0 if self.steered_l0 is None else 1.0

    def auxk_for(self, features: int, latents: int) -> int:
        """Choose how many dead latents the auxiliary loss takes.

        Half the width is what Gao et al. 2024 take for long training. Many more dead latents than
        are active overshoot what is left to explain, and first of all learn smaller scores.
        """
        if self.auxk is not None:
            return self.auxk
        active = self.k if self.has_k else int(self.steered_l0 or features)
        return max(1, min(active, features // 2, latents))

    def dead_after_in(self, tokens: int) -> int:
        """Choose after how many tokens without firing a latent is dead.

        Args:
            tokens: of an epoch.
        """
        if self.dead_after is not None:
            return self.dead_after
        return min(MOST_DEAD_AFTER, max(1, self.epochs * tokens // PARTS_OF_TRAINING))

    def check_width(self, latents: int) -> None:
        """Check that every k of the schedule is possible."""
        for name in ("k", "k_start", "auxk", "multi_k", "target_l0"):
            value = getattr(self, name)
            if name == "k" and self.steered_l0 is None and not self.has_k:
                continue  # not used
            if value is not None and value > latents:
                raise SettingError(
                    name, f"must be at most {latents} (the number of latents), got {value}"
                )
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.prefixes, latents)))
        if not ascending:
            raise SettingError(
                "prefixes",
                f"must lie in 1..{latents - 1} (below the number of latents) and ascend, got "
                f"{', '.join(map(str, self.prefixes))}",
            )
        if latents % self.groups:
            raise SettingError(
                "groups", f"must divide the number of latents {latents}, got {self.groups}"
            )

    def loop(self) -> LoopConfig:
        """Choose what the training loop needs."""
        return LoopConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            log_every=self.log_every,
            checkpoint_every=max(1, self.checkpoint_tokens // self.batch_size),
            progress=self.progress,
        )

    def identity(self) -> dict[str, Any]:
        """Collect the fields that must be equal when a run is resumed, with lists for tuples."""
        fixed = {**super().identity(), "prefixes": list(self.prefixes)}
        if self.init_from is None:
            del fixed["init_from"]  # as in checkpoints that are older than this field
        return fixed

    def without_effect(self) -> dict[str, str]:
        """Name the fields that change nothing beside the values of others, and why."""
        reasons = {}
        with_activation = f"with --activation {self.activation}"
        if self.activation == "relu":
            reasons["k"] = with_activation
        if self.activation != "jumprelu":
            reasons |= dict.fromkeys(("threshold", "bandwidth"), with_activation)
        if self.activation not in ("jumprelu", "relu"):
            reasons["sparsity_warmup"] = with_activation
        if self.k_start == 0:
            reasons["anneal"] = "without --k-start"
        for count, weight in (("auxk", "auxk_weight"), ("multi_k", "multi_weight")):
            if getattr(self, count) == 0:
                reasons[weight] = f"with --{count.replace('_', '-')} 0"
        return reasons
