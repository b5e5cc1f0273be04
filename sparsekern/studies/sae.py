"""Training a sparse autoencoder on stored activations.

One epoch is one pass over all tokens of the files, in the store's shuffled order. Learning rate, k
and the weight of the sparsity loss are functions of the share of all steps that is done: the
learning rate rises over `warmup`, stays, and falls to zero over `decay`; k falls from `k_start` to
`k` over `anneal`; the weight rises over `sparsity_warmup`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import BatchTopK, JumpReLU, TopK, backend
from ..data import ActivationStore
from ..metrics import UnitActivity
from ..models import SparseAutoencoder
from ..models.statistics import squared_error, total_variance
from ..optim import Adam
from ..training import Outcome, RunError, RunFolder, checkpoints, train
from ..training.runs import write_atomically
from . import figures
from .configs import Report, backends_of, check_packages, read_config, usable_device
from .sae_config import PRESETS as PRESETS
from .sae_config import SAEConfig

NAME = "sae"
OPERATIONS = ("linear_topk", "sparse_matmul", "sparse_matmul_backward", "count_active", "adam_step")
MEDIAN_ROWS = 8192
Config = SAEConfig
FILES = ("history.png", "results.json", "metrics.jsonl")
RECOVERED = 0.9
"""Cosine above which a true direction counts as recovered."""


class _Task:
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
            with _autocast(self.config, self.device):
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


def make_model(config: SAEConfig, store: ActivationStore) -> SparseAutoencoder:
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


def _autocast(config: SAEConfig, device: torch.device) -> Any:
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
        with _autocast(config, device):
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


def run(config: SAEConfig, folder: str | Path, *, resume: bool = False) -> Report:
    """Trains, evaluates and fills a run folder.

    Besides what training writes (see training/runs.py), a finished run has results.json and
    history.png.

    Args:
        config: what to run.
        folder: where; must not hold a run yet, unless resumed.
        resume: go on from the folder's checkpoint. The config must equal that of the checkpoint,
            except for its free fields.

    Raises:
        ValueError: the config does not fit the activations.
        DataError: a file of activations is missing, damaged or of another width.
        RunError, CheckpointError, TrainingError: see sparsekern.training.
        BackendUnavailableError: the forced backend cannot run here.
        ModuleNotFoundError: the packages of the extra "data" are not installed.
    """
    folder = Path(folder)
    check_packages()
    device = usable_device(config.device)
    stored = {"study": NAME, "config": asdict(config)}
    with backend(config.backend), _opened(config) as store:
        if not resume:
            RunFolder.check_new(folder)
        task = _Task(config, store, device)
        _probe(task)
        identity = {**config.identity(), "tokens": store.tokens, "features": store.features}
        with RunFolder.open(folder) if resume else RunFolder.create(folder, stored) as place:
            outcome = train(task, config.loop(), place, identity=identity)
            if outcome.signal is not None:
                return Report(outcome, None)
            results = _results(config, task, outcome)
            text = json.dumps(results, indent=2) + "\n"
            write_atomically(place.path / "results.json", text.encode())
            figures.save_sae_history(
                place.path / "history.png", place.read_metrics("step"), config.batch_size
            )
    return Report(outcome, results)


def _opened(config: SAEConfig) -> ActivationStore:
    return ActivationStore(
        list(config.activations), dataset=config.dataset, nonfinite=config.nonfinite
    )


def _probe(task: _Task) -> None:
    """A step of a tiny model: a backend that cannot run fails before anything is written."""
    model = SparseAutoencoder(4, 8, 2).to(task.device)
    with _autocast(task.config, task.device):
        _, loss = model.loss(torch.zeros(2, 4, device=task.device))
    loss.total.backward()


def _results(config: SAEConfig, task: _Task, outcome: Outcome) -> dict[str, Any]:
    task._schedule(config.epochs * task.steps_per_epoch - 1)
    return {
        "activations": list(config.activations),
        "tokens": task.store.tokens * config.epochs,
        "features": task.store.features,
        "latents": len(task.model.dictionary),
        **({"k": task.model.k} if config.counted else {}),
        **evaluate(config, task.model, task.store, task.device),
        "steps": outcome.step,
        "tokens_per_second": outcome.examples_per_second,
        "device": task.device.type,
        "backends": backends_of(OPERATIONS, task.device.type),
    }


def evaluate_run(
    folder: str | Path, activations: tuple[str, ...] = (), *, device: str = "auto"
) -> dict[str, Any]:
    """Measures the checkpoint of a run folder, on its own activations or on others.

    Raises:
        RunError: there is no run of this study, or no checkpoint yet.
        CheckpointError, DataError, ValueError: see `run`.
    """
    folder = Path(folder)
    config = saved_config(folder)
    if activations:
        config = SAEConfig(**{**asdict(config), "activations": activations})
    place = usable_device(device)
    saved = checkpoints.read_checkpoint(folder)
    if saved is None:
        raise RunError(f"no checkpoint to evaluate in {folder}")
    with backend(config.backend), _opened(config) as store:
        model = make_model(config, store)
        checkpoints.load_model(folder, model, saved[0])
        model = model.to(place)
        step, per_epoch = saved[1]["step"], store.count_batches(config.batch_size)
        measured = evaluate(config, model, store, place)
    return {"step": step, "epochs": step / per_epoch, "latents": len(model.dictionary), **measured}


def table(results: Mapping[str, Any], config: SAEConfig) -> str:
    """The final measurements as text for a terminal."""
    return measurements(results, f"Sparse autoencoder on {', '.join(config.activations)}")


def measurements(results: Mapping[str, Any], title: str) -> str:
    """Named measurements as text for a terminal."""
    formats = {
        "tokens_per_second": "{:.0f}", "l0": "{:.1f}", "epochs": "{:.2f}",
        "fvu": "{:.4f}", "cosine": "{:.4f}",
        "dead": "{:.2%}", "silent": "{:.2%}", "recovered": "{:.2%}",
    }  # fmt: skip
    labels = {
        "fvu": "FVU",
        "l0": "L0 (latents per token)",
        "cosine": "mean cosine",
        "dead": "dead latents",
        "silent": "latents silent in evaluation",
        "recovered": "true directions recovered",
        "tokens_per_second": "tokens per second",
    }
    rows = [
        (labels.get(name, name), formats.get(name, "{}").format(value))
        for name, value in results.items()
        if not isinstance(value, (dict, list))
    ]
    rows += [(f"{name} by", name_of) for name, name_of in results.get("backends", {}).items()]
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def saved_config(folder: str | Path) -> SAEConfig:
    """The config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    return read_config(folder, NAME, SAEConfig)
