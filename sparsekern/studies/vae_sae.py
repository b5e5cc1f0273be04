"""The VAE-SAE study: dead units of a sparse layer while k goes from 500 to 50 (arXiv 2603.18056).

The paper's protocol is not public; every default here is declared by us (see models/vae_sae.py for
the model). Dead shares are measured on held-out images with z at its posterior mean, and in the
final evaluation also with sampled z, which gives far lower ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..data import CountError, DSprites, load, rendered
from ..metrics import UnitActivity
from ..models.vae_sae import VAESAE, vae_sae_loss
from ..training import (
    SCHEDULES,
    LoopConfig,
    Outcome,
    RunFolder,
    permuted_rows,
    scheduled_k,
    train,
)
from ..training.runs import write_atomically
from . import figures
from .configs import (
    Report,
    StudyConfig,
    backends_of,
    check_packages,
    option,
    read_config,
    usable_device,
)

NAME = "vae-sae"
EVALUATION_BATCH = 256
SHOWN_IMAGES = 12
LARGEST_SEED = 2**64 - 1  # of torch's generators
OPERATIONS = ("topk", "sparse_matmul", "sparse_matmul_backward", "count_active", "codes_to_dense")


@dataclass(frozen=True)
class VAESAEConfig(StudyConfig):
    """Everything that decides a run. Fields marked free may change when a run is resumed."""

    data: str | None = option(
        None,
        "published dSprites file (.npz or HDF5); without it, images are rendered",
        metavar="FILE",
        free=True,
    )
    images: int = option(3072, "training images, a random subset; one epoch is one pass over them")
    epochs: int = option(50, "passes over the training images; the k schedule spans them all")
    batch_size: int = option(64, "images a step")
    seed: int = option(0, "of the subset, the weights, the order of the images and the noise")
    learning_rate: float = option(1e-3, "of Adam")
    beta: float = option(1.0, "weight of the KL divergence")
    schedule: str = option("linear", "curve of k over the epochs", choices=tuple(SCHEDULES))
    k_start: int = option(500, "active units in the first epoch")
    k_end: int = option(50, "active units in the last epoch")
    units: int = option(500, "width of the sparse layer")
    latents: int = option(10, "width of the VAE's code z")
    width: int = option(16, "channels of the outer convolutions; 32 is the width of the literature")
    eval_images: int = option(1024, "held-out images measured after each epoch")
    test_images: int = option(10000, "other held-out images, measured at the end")
    backend: str = option(
        "auto",
        "implementation of the sparse operations",
        choices=("auto", "reference", "native", "triton"),
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda when there is one", metavar="DEVICE")
    log_every: int = option(10, "steps between two logged steps")
    checkpoint_every: int = option(500, "steps between two checkpoints inside an epoch", free=True)
    progress: bool = option(True, "show a progress bar", free=True)

    def __post_init__(self) -> None:
        for name in (
            "images", "epochs", "batch_size", "units", "latents", "width", "eval_images",
            "test_images", "log_every", "checkpoint_every",
        ):  # fmt: skip
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check_choices()
        self._check("seed", 0 <= self.seed <= LARGEST_SEED, f"must lie in 0..{LARGEST_SEED}")
        # Both chains are false for NaN.
        fits = 0 < self.learning_rate < math.inf
        self._check("learning_rate", fits, "must be above 0 and finite")
        self._check("beta", 0 <= self.beta < math.inf, "must be at least 0 and finite")
        for name in ("k_start", "k_end"):
            fits = 1 <= getattr(self, name) <= self.units
            self._check(name, fits, f"must lie in 1..{self.units} (the number of units)")

    def loop(self) -> LoopConfig:
        """The part that the training loop needs."""
        names = {f.name for f in fields(LoopConfig)}
        return LoopConfig(**{name: value for name, value in asdict(self).items() if name in names})


Config = VAESAEConfig
PRESETS: dict[str, dict[str, Any]] = {"default": {}}
FILES = ("history.png", "reconstructions.png", "results.json", "metrics.jsonl")


class _Task:
    """Model, data and schedule, in the form the training loop asks for."""

    unit = "image"

    def __init__(self, config: VAESAEConfig, training: Tensor, held_out: Tensor) -> None:
        device = training.device
        self.config, self.training, self.held_out = config, training, held_out
        self.examples = len(training)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            self.model = VAESAE(
                latents=config.latents,
                units=config.units,
                k=config.k_start,
                width=config.width,
                mean_pixel=float(training.double().mean()),
            ).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        config = self.config
        self.model.k = scheduled_k(
            config.schedule, config.k_start, config.k_end, epoch, config.epochs
        )
        return {"k": self.model.k}

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        config = self.config
        return permuted_rows(self.examples, config.batch_size, config.seed, epoch, first)

    def backward(self, batch: Tensor) -> dict[str, Tensor]:
        images = _pixels(self.training[batch.to(self.training.device)])
        loss = vae_sae_loss(self.model(images), images, self.config.beta)
        loss.total.backward()
        scalars = {"loss": loss.total, "reconstruction": loss.reconstruction, "kl": loss.kl}
        return {name: value.detach() for name, value in scalars.items()}

    def evaluate(self, epoch: int) -> dict[str, float]:
        measured = evaluate(self.model, self.held_out)
        return {
            "eval_reconstruction": measured["reconstruction"],
            "eval_kl": measured["kl"],
            "eval_l0": measured["l0"],
            "eval_dead": measured["dead"]["never"],
            "train_dead": float(self.model.activity.fraction(self.examples)),
        }


def _pixels(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64] of 0 and 1 -> float32 [B, 1, 64, 64]."""
    return images.unsqueeze(1).float()


@torch.no_grad()
def evaluate(model: VAESAE, images: Tensor, *, sample_seed: int | None = None) -> dict[str, Any]:
    """Measures a model on images, uint8 [n, 64, 64] of 0 and 1 on the model's device.

    Args:
        model: in evaluation mode.
        images: at least one.
        sample_seed: draw z with this seed; by default z is the posterior mean.

    Returns:
        reconstruction and kl in nats per image, l0, and dead: see :meth:`UnitActivity.dead_panel`.
    """
    device = images.device
    activity = UnitActivity(model.dictionary.shape[0], device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if sample_seed is not None:
            torch.manual_seed(sample_seed)
        for part in images.split(EVALUATION_BATCH):
            pixels = _pixels(part)
            output = model(pixels, sample=sample_seed is not None)
            loss = vae_sae_loss(output, pixels)
            sums += torch.stack((loss.reconstruction, loss.kl)).double() * len(part)
            activity.update(output.values, output.indices)
    reconstruction, kl = (sums / len(images)).tolist()
    return {
        "reconstruction": reconstruction,
        "kl": kl,
        "l0": activity.l0(),
        "dead": activity.dead_panel(),
    }


def run(config: VAESAEConfig, folder: str | Path, *, resume: bool = False) -> Report:
    """Trains, evaluates and fills a run folder.

    Besides what training writes (see training/runs.py), a finished run has results.json,
    history.png and reconstructions.png.

    Args:
        config: what to run.
        folder: where; must not hold a run yet, unless resumed.
        resume: go on from the folder's checkpoint. The config must equal that of the checkpoint,
            except for its free fields.

    Raises:
        ValueError: the config does not fit the data (see also sparsekern.data.DataError).
        RunError, CheckpointError, TrainingError: see sparsekern.training.
        BackendUnavailableError: the forced backend cannot run here.
        ModuleNotFoundError: the packages of the extra "data" are not installed.
    """
    folder = Path(folder)
    check_packages()
    device = usable_device(config.device)
    with backend(config.backend):
        _probe(device)
        if not resume:
            RunFolder.check_new(folder)
        data = _images(config)
        parts = data.split(config.images, config.eval_images, config.test_images)
        training, held_out, test = (torch.from_numpy(p.images).to(device) for p in parts)
        digest = hashlib.sha256(data.images.tobytes()).hexdigest()[:16]
        stored = {"study": NAME, "config": asdict(config)}
        # Before the folder: a model that cannot be made leaves nothing behind.
        task = _Task(config, training, held_out)
        with RunFolder.open(folder) if resume else RunFolder.create(folder, stored) as place:
            identity = {**config.identity(), "images' digest": digest}
            outcome = train(task, config.loop(), place, identity=identity)
            if outcome.signal is not None:
                return Report(outcome, None)
            results = _results(config, task.model, test, data.source, outcome)
            _write_results(place, results, task.model, test)
    return Report(outcome, results)


def _probe(device: torch.device) -> None:
    """A step of a tiny model: a backend that cannot run fails before anything is written."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = VAESAE(latents=2, units=4, k=2, hidden=4, width=1).to(device)
        images = torch.zeros(2, 1, 64, 64, device=device)
        vae_sae_loss(model(images), images).total.backward()


def _images(config: VAESAEConfig) -> DSprites:
    """As many images as all parts of a run need together."""
    parts = {name: getattr(config, name) for name in ("images", "eval_images", "test_images")}
    total = sum(parts.values())
    try:
        if config.data is None:
            return rendered(total, seed=config.seed)
        return load(config.data, total, seed=config.seed)
    except CountError as error:
        flags = (f"--{name.replace('_', '-')} {size}" for name, size in parts.items())
        raise CountError(f"{error} ({' + '.join(flags)})") from error


def _results(
    config: VAESAEConfig, model: VAESAE, test: Tensor, source: str, outcome: Outcome
) -> dict[str, Any]:
    model.eval()
    mean = evaluate(model, test)
    sampled = evaluate(model, test, sample_seed=config.seed)
    device = test.device.type
    return {
        "data": source,
        "test_images": len(test),
        "k": model.k,
        **mean,
        "dead_sampled": sampled["dead"],
        "steps": outcome.step,
        "images_per_second": outcome.examples_per_second,
        "device": device,
        "backends": backends_of(OPERATIONS, device),
    }


@torch.no_grad()
def _write_results(
    place: RunFolder, results: Mapping[str, Any], model: VAESAE, test: Tensor
) -> None:
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(place.path / "results.json", text.encode())
    epochs = place.read_metrics("epoch")
    title = f"VAE-SAE on {results['data']}"
    figures.save_history(place.path / "history.png", epochs, title)
    shown = test[:SHOWN_IMAGES]
    output = model(_pixels(shown)).logits.sigmoid().squeeze(1)
    figures.save_reconstructions(
        place.path / "reconstructions.png",
        shown.cpu().numpy(),
        output.cpu().numpy(),
        f"held-out images and their reconstructions at k = {results['k']}",
    )


def table(results: Mapping[str, Any], config: VAESAEConfig) -> str:
    """The final measurements as text for a terminal."""
    dead = results["dead"]
    backends = results["backends"]
    rows: list[tuple[str, str]] = [
        ("data", results["data"]),
        ("training", f"{config.images} images, {config.epochs} epochs, {results['steps']} steps"),
        ("k", f"{config.k_start} -> {config.k_end} of {config.units} ({config.schedule})"),
        ("reconstruction loss", f"{results['reconstruction']:.2f} nats per image"),
        ("KL", f"{results['kl']:.2f} nats per image"),
        ("dead units, never active", f"{dead['never']:.1%}"),
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
    return "\n".join(lines)


def saved_config(folder: str | Path) -> VAESAEConfig:
    """The config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    return read_config(folder, NAME, VAESAEConfig)
