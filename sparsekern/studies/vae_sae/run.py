"""Runs of the study: training, final measurements, pictures, and the table for a terminal.

Dead shares are measured on test images with z at its posterior mean, and also with z drawn, which
gives lower ones where the sparse layer comes after z.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ... import backend
from ...models.vae_sae import VAESAE, vae_sae_loss
from ...training import Outcome, RunFolder, train
from ...training.runs import write_atomically
from .. import figures
from ..runs import RunResult, backends_of, prepared, read_config, run_folder, usable_device
from . import measures
from .config import VAESAEConfig
from .images import Part, Parts, mean_pixel, pixels, read
from .published import CURE, DEAD_UNITS
from .task import VAESAETask, make_model

NAME = "vae-sae"
SHOWN_IMAGES = 12
OPERATIONS = ("topk", "sparse_matmul", "sparse_matmul_backward", "count_active", "codes_to_dense")
FILES = ("history.png", "reconstructions.png", "results.json", "metrics.jsonl")


def run(
    config: VAESAEConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_metrics: Callable[[Mapping[str, Any]], object] | None = None,
) -> RunResult:
    """Train, evaluate and fill a run folder.

    Besides what training writes (see training/runs.py), a finished run has results.json,
    history.png and reconstructions.png.

    Args:
        config: what to run.
        folder: where; must not hold a run yet, unless resumed.
        resume: go on from the folder's checkpoint. The config must equal that of the checkpoint,
            except for its free fields.
        on_metrics: called with every record that is written to metrics.jsonl. What it raises ends
            the run, after a checkpoint.

    Raises:
        ValueError: the config does not fit the data (see also sparsekern.data.DataError).
        RunError, CheckpointError, TrainingError: see sparsekern.training.
        BackendUnavailableError: the forced backend cannot run here.
        ModuleNotFoundError: the packages of the extra "data" are not installed.
    """
    folder = Path(folder)
    config = prepared(config)
    device = usable_device(config.device)
    with backend(config.backend):
        _try_backend(config, device)
        if not resume:
            RunFolder.check_new(folder)
        parts = read(config, device)
        # Before the folder: a model that cannot be made leaves nothing behind.
        task = VAESAETask(config, parts)
        with run_folder(folder, NAME, config, resume=resume, on_metrics=on_metrics) as opened:
            identity = {**config.identity(), "images' digest": parts.digest}
            outcome = train(task, config.loop(), opened, identity=identity)
            if outcome.signal is not None:
                return RunResult(outcome, None)
            results = _collect_results(task, opened, outcome)
            _write_results(opened, results, task.vae, parts.test)
    return RunResult(outcome, results)


def _try_backend(config: VAESAEConfig, device: torch.device) -> None:
    """Run a step of a tiny model: a backend that cannot run fails before anything is written."""
    tiny = replace(config, latents=2, units=4, k_start=2, k_end=2, width=1, side=32)
    model = make_model(tiny, 1, 0.5).to(device)
    images = torch.zeros(2, 1, 32, 32, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        vae_sae_loss(model(images), images).total.backward()


def _collect_results(task: VAESAETask, opened: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """Collect the measurements of a finished run.

    Those at the end on top, those at the end of the schedule and before training below, and what
    became of each unit.
    """
    config, parts = task.config, task.parts
    epochs = opened.read_metrics("epoch")
    device = parts.test.images.device.type
    return {
        "data": parts.source,
        "test_images": len(parts.test.images),
        "k": task.vae.k,
        **epochs[-1]["test"],
        "schedule": {"k": epochs[config.epochs - 1]["k"], **epochs[config.epochs - 1]["test"]},
        "untrained": _measure_untrained(config, parts),
        # Epochs after the schedule would date a death by the last chance activity in them.
        "death_epoch": task.model.death_epochs(config.epochs),
        "death_epoch_after": task.model.death_epochs(config.all_epochs),
        "steps": outcome.step,
        "images_per_second": outcome.examples_per_second,
        "seconds": len(parts.training.images) * config.all_epochs / outcome.examples_per_second,
        "device": device,
        "backends": backends_of(OPERATIONS, device),
    }


def _measure_untrained(config: VAESAEConfig, parts: Parts) -> dict[str, Any]:
    """Measure the model before its first step: what random weights give."""
    images = parts.training.images
    model = make_model(config, images.shape[1], mean_pixel(images)).to(images.device).eval()
    return measures.measure(model, parts.test, config.seed, monte_carlo=False)


@torch.no_grad()
def _write_results(
    opened: RunFolder, results: Mapping[str, Any], model: VAESAE, test: Part
) -> None:
    epochs = opened.read_metrics("epoch")
    title = f"VAE-SAE on {results['data']}"
    figures.save_history(opened.path / "history.png", epochs, title)
    shown = pixels(test.images[:SHOWN_IMAGES])
    output = model(shown).logits.sigmoid()
    figures.save_reconstructions(
        opened.path / "reconstructions.png",
        _plot_arrays(shown),
        _plot_arrays(output),
        f"held-out images and their reconstructions at k = {results['k']}",
    )
    # Last: it says that the run is finished.
    text = json.dumps(results, allow_nan=False) + "\n"
    write_atomically(opened.path / "results.json", text.encode())


def _plot_arrays(images: torch.Tensor) -> Any:
    """Arrange [n, C, side, side] as a plot takes it: [n, side, side] or [n, side, side, 3]."""
    shown = images.float().cpu()
    return (shown.squeeze(1) if shown.shape[1] == 1 else shown.permute(0, 2, 3, 1)).numpy()


def table(results: Mapping[str, Any], config: VAESAEConfig) -> str:
    """Format the final measurements for a terminal."""
    dead = results["dead"]
    backends = results["backends"]
    rows: list[tuple[str, str]] = [
        ("data", results["data"]),
        (
            "training",
            f"{config.images} images, {config.all_epochs} epochs, {results['steps']} steps",
        ),
        ("sparse layer", f"{config.sparsifier}, placement {config.placement}"),
        ("k", f"{config.k_start} -> {config.k_end} of {config.units} ({config.schedule})"),
        ("reconstruction loss", f"{results['reconstruction']:.2f} nats per image"),
        ("KL", f"{results['kl']:.2f} nats per image"),
        ("MIG of z", f"{results['mig']['score']:.3f}"),
        ("dead units, never active", f"{dead['never']:.1%}"),
        *_published_rate(config),
        ("dead units, z sampled", f"{results['dead_sampled']['never']:.1%}"),
        *((f"dead units, {name}", f"{share:.1%}") for name, share in dead.items() if "<" in name),
        ("L0", f"{results['l0']:.1f} units per image"),
        ("images per second", f"{results['images_per_second']:.0f} in training"),
        *((f"{name} by", backends[name]) for name in OPERATIONS if name in backends),
    ]
    width = max(len(name) for name, _ in rows)
    held_out = f"{results['test_images']} held-out images"
    lines = [f"VAE-SAE on {results['device']}, measured on {held_out}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    if config.placement == "encoder" and not config.standardize and config.revival == "none":
        lines.append(CURE)
    return "\n".join(lines)


def _published_rate(config: VAESAEConfig) -> list[tuple[str, str]]:
    """List the study's own rate of dead units, for a run that sparsifies as far as the study."""
    rate = DEAD_UNITS.get((config.sparsifier, config.dataset))
    if rate is None or (config.units, config.k_start, config.k_end) != (500, 500, 50):
        return []
    mean, spread = rate
    return [("dead units, the study", f"{mean} % ± {spread} % (arXiv 2603.18056)")]


def saved_config(folder: str | Path) -> VAESAEConfig:
    """Read the config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    return read_config(folder, NAME, VAESAEConfig)
