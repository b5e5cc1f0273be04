"""Runs of the study: training, final measurements, and the table for a terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ... import backend
from ...data.motifs.domain import MotifDomain
from ...data.motifs.registry import motif_domain
from ...training import RunFolder, train
from ...training.runs import write_atomically
from ..runs import RunResult, backends_of, prepared, read_config, run_folder, usable_device
from . import figures, measures
from .config import PRESETS, SparlingConfig
from .cost import Cost, cost_of, draw_seconds
from .task import CHANNELS, SparlingTask

NAME = "sparling"
OPERATIONS = ("channel_threshold", "threshold_relu")  # of the bottleneck with thresholds
FILES = ("results.json", "metrics.jsonl", "motifs.png")
DIGESTED = 512  # recordings


def run(
    config: SparlingConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_metrics: Callable[[Mapping[str, Any]], object] | None = None,
) -> RunResult:
    """Train, measure and fill a run folder.

    A finished run has results.json and motifs.png besides what training writes (see
    training/runs.py).

    Args:
        config: what to run.
        folder: where; must not hold a run yet, unless resumed.
        resume: go on from the folder's checkpoint. The config must equal that of the checkpoint,
            except for its free fields.
        on_metrics: called with every record that is written to metrics.jsonl. What it raises ends
            the run, after a checkpoint.

    Raises:
        DataError: the recordings cannot be used.
        RunError, CheckpointError, TrainingError: see sparsekern.training.
        BackendUnavailableError: the forced backend cannot run here.
        ModuleNotFoundError: the packages of the extra "data" are not installed.
    """
    folder = Path(folder)
    config = prepared(config)
    device = usable_device(config.device)
    with backend(config.backend):
        if not resume:
            RunFolder.check_new(folder)
        domain, tested = domain_of(config), domain_of(config, test=True)
        task = SparlingTask(config, domain, tested, device)
        with run_folder(folder, NAME, config, resume=resume, on_metrics=on_metrics) as opened:
            identity = config.identity()
            if config.data is not None:  # else the digits are synthesised
                identity["recordings' digest"] = recordings_digest(config.data)
            outcome = train(task, config.loop(), opened, identity=identity)
            if outcome.signal is not None:
                return RunResult(outcome, None)
            results = {
                **_measure(task, tested, config, device),
                "steps": outcome.step,
                "samples_per_second": outcome.examples_per_second,
                "seconds": config.samples / outcome.examples_per_second,
                "cost": cost_of(task.motifs, domain, device)._asdict(),
                "draw_seconds": draw_seconds(domain),
                "device": device.type,
                "backends": backends_of(OPERATIONS if task.sparse else (), device.type),
            }
            picture = figures.found_motifs(task.motifs, tested, results["assignment"], device)
            write_atomically(opened.path / "motifs.png", picture)
            # Last: it says that the run is finished.
            text = json.dumps(results, allow_nan=False) + "\n"
            write_atomically(opened.path / "results.json", text.encode())
    return RunResult(outcome, results)


def recordings_digest(folder: str | Path) -> str:
    """Hash the recordings in a folder with SHA-256, wherever it lies.

    The names and sizes of all, and what about 512 of them hold.
    """
    paths = sorted(Path(folder).rglob("*.wav"))
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if number % max(1, len(paths) // DIGESTED) == 0:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def domain_of(config: SparlingConfig, *, test: bool = False) -> MotifDomain:
    """Make the domain of a run; that of its tests has other speakers where there are any."""
    options = {"folder": config.data} if config.data is not None else {}
    if test and config.domain == "audio":
        options["split"] = "test"
    return motif_domain(config.domain, **options)


@torch.no_grad()
def _measure(
    task: SparlingTask, tested: MotifDomain, config: SparlingConfig, device: torch.device
) -> dict[str, Any]:
    channels, count = CHANNELS[config.domain], config.test_samples
    task.motifs.eval()
    gate = task.model.gate
    measured = measures.measure(task.motifs, tested, count, channels, device)
    return {
        "domain": tested.name,
        "origin": tested.origin,
        "test_samples": count,
        "validation_exact": measures.accuracy(task.motifs, task.domain, task.validation, device),
        "trained_density": float(gate.trained_density) if task.sparse else None,
        "annealed_at": int(gate.reached) if task.sparse and gate.done else None,
        **measured,
        "perturbation": measures.perturbed(task.motifs, tested, count, measured, device),
    }


def table(results: Mapping[str, Any], config: SparlingConfig) -> str:
    """Format the final measurements for a terminal."""

    def share(name: str) -> str:
        measured = results[name]
        if measured["value"] is None:
            return "none to count"
        low, high = (100 * measured[end] for end in ("low", "high"))
        return f"{100 * measured['value']:.2f} %  (95 %: {low:.2f} to {high:.2f})"

    rows: list[tuple[str, str]] = [
        ("domain", f"{results['domain']}: {results['origin']}"),
        ("training", f"{config.samples} samples, {results['steps']} steps"),
        ("bottleneck", config.bottleneck),
        ("false positive error", share("fpe")),
        ("false negative error", share("fne")),
        ("confusion error", share("ce")),
        ("end-to-end error", share("e2ee")),
        ("exact labels", share("exact")),
        (
            "perturbation consistency",
            f"{share('perturbation')}, of {results['perturbation']['inputs']} inputs",
        ),
        (
            "density",
            f"{results['density']:.3g}, {results['relative_density']:.2f} times the motifs'",
        ),
        ("samples per second", f"{results['samples_per_second']:.3g} in training"),
        (
            "cost of a sample",
            _describe_cost(Cost(**results["cost"]), results["draw_seconds"], config),
        ),
        *((f"{name} by", served) for name, served in results["backends"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    head = f"Sparling on {results['device']}, measured on {results['test_samples']} test samples"
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _describe_cost(cost: Cost, drawing: float, config: SparlingConfig) -> str:
    """Format what a sample costs, and what the published size would."""
    published = {"samples": config.samples, **PRESETS.get(config.domain, {})}
    samples, validate_every = (
        published["samples"],
        published.get("validate_every", config.validate_every),
    )
    validated = (
        samples // validate_every * published.get("validation_samples", config.validation_samples)
    )
    seconds = cost.gpu_seconds()
    # A forward pass is a third of a step.
    training, validation = (count * seconds / 3600 for count in (samples, validated / 3))
    return (
        f"{cost.flops / 1e9:.3g} GFLOP, {cost.bytes / 1e6:.3g} MB; {samples} samples on an H200: "
        f"{training:.2g} h and {validation:.2g} h of validation (estimated, not measured); to draw "
        f"them, {samples * drawing / 3600:.2g} h of one core"
    )


def saved_config(folder: str | Path) -> SparlingConfig:
    """Read the config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    return read_config(folder, NAME, SparlingConfig)
