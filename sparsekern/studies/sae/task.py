"""Training a sparse autoencoder on stored activations.

One epoch is one pass over all tokens of the files, in the store's shuffled order. Learning rate, k
and the weight of the sparsity loss are functions of the share of all steps that is done: the
learning rate rises over `warmup`, stays, and falls to zero over `decay`; k falls from `k_start` to
`k` over `anneal`; the weight rises over `sparsity_warmup`, unless jumprelu is steered to a target.

Thresholds of batchtopk (before each evaluation) and of a steered jumprelu (at the end) are set so
that rows of training have the wanted number of active latents on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ... import BatchTopK, JumpReLU, TopK
from ...models import SparseAutoencoder
from ...ops.count_active import count_active
from ...optim import Adam
from ...sae.statistics import squared_error, total_variance
from .config import SAEConfig
from .parts import Parts, parts_of
from .rows import Rows

FIRST_ROWS = 8192  # that first weights and thresholds are fitted to
# The logarithms of jumprelu's thresholds have to move by 1 or more, weights by far less.
THRESHOLD_RATE = 10.0
RECOVERED = 0.9
"""Cosine above which a true direction counts as recovered."""


class SAETask:
    """Model, activations and schedules, in the form the training loop asks for.

    mesh: of the processes that share the work; None: this is the only one. They all get whole
    batches, of which each takes its rows.
    """

    unit = "token"

    def __init__(
        self, config: SAEConfig, rows: Rows, device: torch.device, mesh: Any = None
    ) -> None:
        self.config, self.rows, self.device = config, rows, device
        self.examples = rows.tokens
        self.steps_per_epoch = rows.count_batches(config.batch_size)
        self.step = 0
        self.model = make_model(config, rows, mesh).to(device)
        self.parts = parts_of(self.model)
        first = self._sample()
        self.model.initialize(first)
        layer = self.model.activation
        if isinstance(layer, JumpReLU) and config.threshold is not None:
            nn.init.constant_(layer.log_threshold, math.log(config.threshold))
        elif isinstance(layer, JumpReLU) and config.steered_l0 is None:
            self.model.calibrate(first, config.k)
        self.optimizer = Adam(_parameter_groups(config, self.model), lr=config.learning_rate)

    def _sample(self) -> Tensor:
        """Take this process's share of some rows."""
        return self.parts.own_rows(self.rows.sample(FIRST_ROWS, self.device))

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Do nothing: the schedules follow the steps, see :meth:`backward`."""
        return {}  # the schedules follow the steps: see backward

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """Start an epoch at batch ``first``; each is rows [n, D], normalised."""
        self.step = epoch * self.steps_per_epoch + first
        return self.rows.batches(epoch, first, self.device)

    def backward(self, batch: Tensor) -> dict[str, Tensor]:
        """Add the gradients of a batch's loss, then raise the biases of dead latents."""
        self._schedule(self.step)
        self.step += 1
        variance = total_variance(batch)
        sums: dict[str, Tensor] = {}
        for rows in batch.split(self.config.micro_batch or len(batch)):
            part = self.parts.own_rows(rows)
            with autocast(self.config, self.device):
                output, loss = self.model.loss(part, variance=variance, rows=len(batch))
            loss.total.backward()
            terms = {
                "loss": loss.total,
                "fvu": loss.fvu,
                "auxk": loss.auxk,
                "multi": loss.multi,
                "sparsity": loss.sparsity,
                "prefixes": loss.prefixes,
                "l0": (output.values != 0).sum() / len(batch),
                "cosine": _sum_of_cosines(part, output.reconstruction) / len(batch),
            }
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
        dead = self.model.counter.dead(self.model.dead_after)
        values = output.values.detach()
        smallest, (l0, count) = self.parts.of_latents(
            torch.where(values > 0, values, torch.inf), sums["l0"], dead.sum()
        )
        self._revive(smallest.float(), dead)
        sums["l0"] = self.parts.sum_of_rows(l0)
        sums["cosine"] = self.parts.sum_of_rows(sums["cosine"])
        sums["dead"] = count.float() / self.model.encoder_bias.numel()
        if self.config.has_k:
            sums["k"] = torch.tensor(float(self.model.k))
        return sums

    @torch.no_grad()
    def _revive(self, active: Tensor, dead: Tensor) -> None:
        """Raise the bias of dead latents until they fire; less while the learning rate falls.

        active: [rows], what a latent has to exceed in a row, inf where none is active; dead: bool
        of this process's latents.

        In each step by a share of what a latent has to exceed to be active.

        With k = 8 of 3072 latents and 150 steps on two layers of a sentence model, 2 to 5 % of the
        latents are silent instead of 14 to 24 %, and FVU is 0.3 to 0.6 % larger; in the 6000 steps
        of the preset "synthetic" FVU is 5 % smaller. A rise that does not go by the length of
        training (2 % a step) leaves latents active where they should not be: 50 % larger.
        """
        if not self.config.revival:
            return
        rows = active < torch.inf
        level = self.parts.sum_of_rows(torch.where(rows, active, 0).sum())
        level = level / self.parts.sum_of_rows(rows.sum()).clamp_min(1)
        falling = self.optimizer.param_groups[0]["lr"] / self.config.learning_rate
        steps = max(1, self.config.epochs * self.steps_per_epoch)
        rise = self.config.revival / steps * falling * level
        self.parts.local(self.model.encoder_bias).add_(torch.where(dead, rise, 0))

    def _schedule(self, step: int) -> None:
        """Set learning rate, k and the weight of the sparsity loss of a step."""
        config = self.config
        total = max(1, config.epochs * self.steps_per_epoch)
        done = step / total
        rise = min(1.0, (step + 1) / max(1.0, config.warmup * total))
        fall = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
        for group, rate in zip(
            self.optimizer.param_groups, (1.0, 1.0, THRESHOLD_RATE), strict=False
        ):
            group["lr"] = config.learning_rate * rise * fall * rate
        rises = config.sparsity_warmup > 0 and config.steered_l0 is None
        risen = min(1.0, done / config.sparsity_warmup) if rises else 1.0
        self.model.sparsity_weight = config.weight_of_sparsity * risen
        if config.has_k:
            start = (config.k_start or config.k) // config.groups
            share = min(1.0, done / config.anneal) if config.anneal else 1.0
            self.model.k = (
                round(start + (config.k // config.groups - start) * share) * config.groups
            )

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Set thresholds where they are due, and measure."""
        self._schedule((epoch + 1) * self.steps_per_epoch - 1)
        # The threshold of BatchTopK plays no part in training.
        if isinstance(self.model.activation, BatchTopK) or epoch + 1 == self.config.epochs:
            with autocast(self.config, self.device):
                self.model.calibrate(self._sample())
        measured = evaluate(self.config, self.model, self.rows, self.device)
        return {f"eval_{name}": value for name, value in measured.items()}


class DataSize(Protocol):
    """What knows how wide its activations are and how many: rows, or a checkpoint."""

    @property
    def features(self) -> int:
        """D."""

    @property
    def tokens(self) -> int:
        """Of an epoch."""


def make_model(config: SAEConfig, rows: DataSize, mesh: Any = None) -> SparseAutoencoder:
    """Make the model of a config, with its first weights, on the CPU.

    With a mesh it is a `ShardedAutoencoder`, on the mesh's devices.

    Raises:
        ValueError: a number of active latents is above the number of latents.
    """
    features = rows.features
    latents = config.latents or 8 * features
    config.check_width(latents)
    model_class: Callable[..., SparseAutoencoder] = SparseAutoencoder
    if mesh is not None:
        from ...distributed import ShardedAutoencoder

        model_class = partial(ShardedAutoencoder, mesh=mesh)
    with torch.random.fork_rng([]):
        # Not the seed itself: synthetic activations of that seed begin with the same numbers.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, 1)).generate_state(1)[0]))
        return model_class(
            features,
            latents,
            activation=_activation(config, latents),
            sparsity_weight=config.weight_of_sparsity,
            target_l0=config.steered_l0,
            prefixes=config.prefixes,
            auxk=config.auxk_for(features, latents),
            auxk_weight=config.auxk_weight,
            multi_k=config.multi_k,
            multi_weight=config.multi_weight,
            dead_after=config.dead_after_in(rows.tokens),
            tied=config.tied,
            scale_scores=config.scale_scores,
        )


def _activation(config: SAEConfig, latents: int) -> nn.Module:
    """Make the activation of a config."""
    if config.activation == "batchtopk":
        return BatchTopK(config.k)
    if config.activation == "jumprelu":
        return JumpReLU(latents, bandwidth=config.bandwidth)
    if config.activation == "relu":
        return nn.ReLU()
    return TopK(config.k, groups=config.groups)


def _parameter_groups(config: SAEConfig, model: SparseAutoencoder) -> list[dict[str, Any]]:
    """Group parameters for the optimizer: dictionary, other weights, thresholds."""
    rest = [model.encoder_bias, model.decoder_bias]
    if not config.tied:
        rest.append(model.encoder)
    thresholds = list(model.activation.parameters())
    return [
        {"params": [model.dictionary], "unit_rows": not config.scale_scores},
        {"params": rest},
        *([{"params": thresholds}] if thresholds else []),
    ]


def autocast(config: SAEConfig, device: torch.device) -> Any:
    """Enter an autocast region to bfloat16 where the config asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast)


def _sum_of_cosines(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Add up the cosines of rows and their reconstructions."""
    return torch.nn.functional.cosine_similarity(x.float(), reconstruction.float(), dim=-1).sum()


@torch.no_grad()
def evaluate(
    config: SAEConfig, model: SparseAutoencoder, rows: Rows, device: torch.device
) -> dict[str, float]:
    """Measure a model on the rows to measure.

    Returns:
        fvu, in the units that the model is trained in; fvu_unnormalized, in those of the files,
        where these differ; fvu_<n> of the reconstruction from the first n latents, for each prefix;
        l0 (latents per token that are not zero), cosine (mean, between activations and
        reconstructions), dead (share of latents dead by the model's counter), silent (share that
        never fired in these rows) and, for files that know their true directions, recovered (the
        share of them that some row of the dictionary meets with a cosine above 0.9).
    """
    model.eval()
    parts = parts_of(model)
    stored = rows.measured(device)
    # In how many rows each latent is active.
    fired = torch.zeros(model.encoder_bias.numel(), dtype=torch.int64, device=device)
    totals: dict[str, Tensor] = {}
    for measured_rows in stored.split(config.micro_batch or config.batch_size):
        part = parts.own_rows(measured_rows)
        factors = rows.factors(part)
        x = part * factors
        with autocast(config, device):
            output, prefixes = model.reconstruct(x)
        fired += count_active(output.indices, len(fired), output.values)
        sums = {
            "fvu": squared_error(x, output.reconstruction),
            "fvu_unnormalized": squared_error(part, output.reconstruction / factors),
            "cosine": _sum_of_cosines(x, output.reconstruction),
        }
        for size, estimate in zip(model.prefixes, prefixes, strict=True):
            sums[f"fvu_{size}"] = squared_error(x, estimate)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.double()
    fired = parts.sum_of_all(fired)
    totals = {name: parts.sum_of_rows(total) for name, total in totals.items()}
    variance = total_variance(stored * rows.factors(stored))
    original = totals.pop("fvu_unnormalized") / total_variance(stored)
    measured = {
        name: float(total / (len(stored) if name == "cosine" else variance))
        for name, total in totals.items()
    }
    if config.normalize != "none":
        measured["fvu_unnormalized"] = float(original)
    measured["l0"] = float(fired.sum()) / len(stored)
    measured["dead"] = float(parts.dead(model))
    measured["silent"] = float((fired == 0).double().mean())
    if rows.directions is not None:
        directions = rows.directions.to(device)
        measured["recovered"] = recovered(parts.local(model.dictionary), directions, parts)
    return measured


def recovered(dictionary: Tensor, directions: Tensor, parts: Parts | None = None) -> float:
    """Compute the share of directions [n, D] that some row of the dictionary [N, D] meets.

    With a cosine above 0.9. With parts, the dictionary is this process's.
    """
    normalize = torch.nn.functional.normalize
    rows = normalize(dictionary.detach().float(), dim=1)
    best = torch.cat([
        (part @ rows.t()).amax(1) for part in normalize(directions.float(), dim=1).split(1024)
    ])  # fmt: skip
    best = (parts or Parts()).largest_of_latents(best)
    return float((best > RECOVERED).double().mean())
