"""Runs of sparse autoencoders: training, evaluating and reading run folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import backend
from ..data import ActivationStore
from ..models import SparseAutoencoder
from ..training import Outcome, RunError, RunFolder, checkpoints, train
from ..training.runs import write_atomically
from . import figures
from .configs import Report, backends_of, check_packages, read_config, usable_device
from .sae import SAETask, autocast, evaluate, make_model
from .sae_config import SAEConfig

__all__ = ["FILES", "evaluate_run", "measurements", "run", "saved_config", "table"]

NAME = "sae"
OPERATIONS = ("linear_topk", "sparse_matmul", "sparse_matmul_backward", "count_active", "adam_step")
FILES = ("history.png", "results.json", "metrics.jsonl")


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
        task = SAETask(config, store, device)
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


def _probe(task: SAETask) -> None:
    """A step of a tiny model: a backend that cannot run fails before anything is written."""
    model = SparseAutoencoder(4, 8, 2).to(task.device)
    with autocast(task.config, task.device):
        _, loss = model.loss(torch.zeros(2, 4, device=task.device))
    loss.total.backward()


def _results(config: SAEConfig, task: SAETask, outcome: Outcome) -> dict[str, Any]:
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
