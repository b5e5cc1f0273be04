"""Training a sparse autoencoder on stored activations.

One epoch is one pass over all tokens of the files, in the store's shuffled order. Learning rate, k
and the weight of the sparsity loss are functions of the share of all steps that is done: the
learning rate rises over `warmup`, stays, and falls to zero over `decay`; k falls from `k_start` to
`k` over `anneal`; the weight rises over `sparsity_warmup`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import BatchTopK, JumpReLU, TopK
from ..data import ActivationStore
from ..metrics import UnitActivity
from ..models import SparseAutoencoder
from ..models.statistics import squared_error, total_variance
from ..optim import Adam
from .sae_config import PRESETS as PRESETS
from .sae_config import SAEConfig

MEDIAN_ROWS = 8192
Config = SAEConfig
RECOVERED = 0.9
"""Cosine above which a true direction counts as recovered."""


def __getattr__(name: str) -> Any:
    """What runs are made and read with: of sae_runs.py, which imports this file."""
    from . import sae_runs

    if name not in sae_runs.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(sae_runs, name)


class SAETask:
    """Model, activations and schedules, in the form the training loop asks for."""

    unit = "token"

    def __init__(self, config: SAEConfig, store: ActivationStore, device: torch.device) -> None:
        self.config, self.store, self.device = config, store, device
        self.examples = store.tokens
        self.steps_per_epoch = store.count_batches(config.batch_size)
        self.step = 0
        self.model = make_model(config, store).to(device)
        self.model.initialize_bias(_sample(config, store, MEDIAN_ROWS, device))
        self.optimizer = Adam(_groups(config, self.model), lr=config.learning_rate)

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        return {}  # the schedules follow the steps: see backward

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        self.step = epoch * self.steps_per_epoch + first
        config = self.config
        return self.store.batches(
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            start=first,
            buffer_rows=config.buffer_rows,
            device=self.device,
        )

    def backward(self, batch: Tensor) -> dict[str, Tensor]:
        self._schedule(self.step)
        self.step += 1
        variance = total_variance(batch)
        sums: dict[str, Tensor] = {}
        for part in batch.split(self.config.micro_batch or len(batch)):
            with autocast(self.config, self.device):
                output, loss = self.model.loss(part, variance=variance, rows=len(batch))
            loss.total.backward()
            share = len(part) / len(batch)
            terms = {
                "loss": loss.total,
                "fvu": loss.fvu,
                "auxk": loss.auxk,
                "multi": loss.multi,
                "sparsity": loss.sparsity,
                "prefixes": loss.prefixes,
                "l0": share * (output.values != 0).sum(-1).float().mean(),
                "cosine": share * _cosine(part, output.reconstruction),
            }
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
        sums["dead"] = self.model.counter.fraction(self.config.dead_after)
        if self.config.counted:
            sums["k"] = torch.tensor(float(self.model.k))
        return sums

    def _schedule(self, step: int) -> None:
        """Learning rate, k and the weight of the sparsity loss at a step."""
        config = self.config
        total = max(1, config.epochs * self.steps_per_epoch)
        done = step / total
        rise = min(1.0, (step + 1) / max(1.0, config.warmup * total))
        fall = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rise * fall
        risen = min(1.0, done / config.sparsity_warmup) if config.sparsity_warmup else 1.0
        self.model.sparsity_weight = config.sparsity_weight * risen
        if config.counted:
            start = (config.k_start or config.k) // config.groups
            way = min(1.0, done / config.anneal) if config.anneal else 1.0
            self.model.k = round(start + (config.k // config.groups - start) * way) * config.groups

    def evaluate(self, epoch: int) -> dict[str, float]:
        self._schedule((epoch + 1) * self.steps_per_epoch - 1)
        measured = evaluate(self.config, self.model, self.store, self.device)
        return {f"eval_{name}": value for name, value in measured.items()}


class Wide(Protocol):
    """What has a number of features: an activation store, or a checkpoint."""

    @property
    def features(self) -> int:
        """D."""


def make_model(config: SAEConfig, store: Wide) -> SparseAutoencoder:
    """The model of a config, with its first weights, on the CPU.

    Raises:
        ValueError: a number of active latents is above the number of latents.
    """
    latents = config.latents or 8 * store.features
    config.check_width(latents)
    with torch.random.fork_rng([]):
        # Not the seed itself: synthetic activations of that seed begin with the same numbers.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, 1)).generate_state(1)[0]))
        return SparseAutoencoder(
            store.features,
            latents,
            activation=_activation(config, latents),
            sparsity_weight=config.sparsity_weight,
            prefixes=config.prefixes,
            auxk=config.auxk,
            auxk_weight=config.auxk_weight,
            multi_k=config.multi_k,
            multi_weight=config.multi_weight,
            dead_after=config.dead_after,
            tied=config.tied,
            scale_scores=config.scale_scores,
        )


def _activation(config: SAEConfig, latents: int) -> nn.Module:
    if config.activation == "batchtopk":
        return BatchTopK(config.k)
    if config.activation == "jumprelu":
        return JumpReLU(latents, threshold=config.threshold, bandwidth=config.bandwidth)
    if config.activation == "relu":
        return nn.ReLU()
    return TopK(config.k, groups=config.groups)


def _groups(config: SAEConfig, model: SparseAutoencoder) -> list[dict[str, Any]]:
    rest = [model.encoder_bias, model.decoder_bias, *model.activation.parameters()]
    if not config.tied:
        rest.append(model.encoder)
    return [
        {"params": [model.dictionary], "unit_rows": not config.scale_scores},
        {"params": rest},
    ]


def _sample(config: SAEConfig, store: ActivationStore, rows: int, device: torch.device) -> Tensor:
    """Some rows in the order of an epoch that training does not use."""
    batches = store.batches(
        min(rows, store.tokens),
        seed=config.seed,
        epoch=config.epochs,
        buffer_rows=config.buffer_rows,
        device=device,
        prefetch=False,
    )
    with contextlib.closing(batches):
        return next(batches)


def autocast(config: SAEConfig, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast)


def _cosine(x: Tensor, reconstruction: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x.float(), reconstruction.float(), dim=-1).mean()


@torch.no_grad()
def evaluate(
    config: SAEConfig, model: SparseAutoencoder, store: ActivationStore, device: torch.device
) -> dict[str, float]:
    """Measures a model on `eval_tokens` rows of a store.

    Returns:
        fvu, l0 (latents per token that are not zero), cosine (mean, between activations and
        reconstructions), dead (share of latents dead by the model's counter), silent (share that
        never fired in these rows) and, for a store that knows its true directions, recovered (the
        share of them that some row of the dictionary meets with a cosine above 0.9).
    """
    model.eval()
    rows = _sample(config, store, config.eval_tokens, device)
    activity = UnitActivity(len(model.dictionary), device)
    error = torch.zeros((), dtype=torch.float64, device=device)
    cosine = torch.zeros((), dtype=torch.float64, device=device)
    for part in rows.split(config.micro_batch or config.batch_size):
        with autocast(config, device):
            output = model(part)
        activity.update(output.values.float(), output.indices)
        error += squared_error(part, output.reconstruction).double()
        cosine += _cosine(part, output.reconstruction).double() * len(part)
    measured = {
        "fvu": float(error / total_variance(rows)),
        "l0": activity.l0(),
        "cosine": float(cosine / len(rows)),
        "dead": float(model.counter.fraction(model.dead_after)),
        "silent": activity.dead_panel()["never"],
    }
    if store.directions is not None:
        measured["recovered"] = recovered(model.dictionary, store.directions.to(device))
    return measured


def recovered(dictionary: Tensor, directions: Tensor) -> float:
    """The share of directions [n, D] that some row of the dictionary [N, D] meets with a cosine
    above 0.9."""
    normalize = torch.nn.functional.normalize
    rows = normalize(dictionary.detach().float(), dim=1)
    best = torch.cat([
        (part @ rows.t()).amax(1) for part in normalize(directions.float(), dim=1).split(1024)
    ])  # fmt: skip
    return float((best > RECOVERED).double().mean())
