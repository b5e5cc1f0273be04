"""Runs of sparse autoencoders: training, evaluating and reading run folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import BatchTopK, JumpReLU, backend, describe
from ...data import ActivationStore
from ...models import SparseAutoencoder
from ...training import Outcome, RunError, RunFolder, checkpoints, train
from ...training.processes import Processes
from ...training.runs import write_atomically
from .. import figures
from ..configs import SettingError
from ..processes import job
from ..runs import RunResult, backends_of, prepared, read_config, run_folder, usable_device
from .config import SAEConfig
from .rows import Rows
from .task import SAETask, autocast, evaluate, make_model

__all__ = [
    "FILES", "TrainedRun", "comparison", "evaluate_run", "load_run", "measurements", "run",
    "saved_config", "table",
]  # fmt: skip

NAME = "sae"
OPERATIONS = ("linear_topk", "sparse_matmul", "sparse_matmul_backward", "count_active", "adam_step")
RESULTS = "results.json"
FILES = ("history.png", RESULTS, "metrics.jsonl")
DIGEST = "activations' digest"
# Rows that tell files of activations apart.
DIGEST_BYTES = 1 << 26
LEAST_PIECES, PIECE = 64, 64
FVU_FORMAT = "{:.4f}"
FORMATS = {
    "tokens_per_second": "{:.0f}", "l0": "{:.1f}", "epochs": "{:.2f}",
    "cosine": "{:.4f}", "scale": "{:.6g}",
    "dead": "{:.2%}", "silent": "{:.2%}", "recovered": "{:.2%}",
}  # fmt: skip
LABELS = {
    "outliers": "tokens left out as outliers",
    "target_l0": "target of L0",
    "scale": "activations multiplied by",
    "auxk": "auxk (dead latents per token)",
    "dead_after": "dead after tokens",
    "measured_on": "measured on",
    "fvu": "FVU",
    "fvu_unnormalized": "FVU in the files' units",
    "l0": "L0 (latents per token)",
    "cosine": "mean cosine",
    "dead": "dead latents",
    "silent": "latents silent in evaluation",
    "recovered": "true directions recovered",
    "tokens_per_second": "tokens per second",
}


def run(
    config: SAEConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    extend: bool = False,
    on_metrics: Callable[[Mapping[str, Any]], object] | None = None,
    mesh: str | None = None,
) -> RunResult:
    """Train, evaluate and fill a run folder.

    Besides what training writes (see training/runs.py), a finished run has results.json and
    history.png.

    Args:
        config: what to run.
        folder: where; must not hold a run yet, unless resumed.
        resume: go on from the folder's checkpoint. The config must equal that of the checkpoint,
            except for its free fields, and so must what the files of activations hold, wherever
            they lie now.
        extend: with resume: config.epochs may be more than the run had. Learning rate, k and the
            weight of the sparsity loss then are what they would be at this step of a run that had
            been that long from the start: after a decay to zero, the learning rate is high again.
        on_metrics: called with every record that is written to metrics.jsonl. What it raises ends
            the run, after a checkpoint.
        mesh: how the processes that torchrun started share the work, such as "data=1,latents=2":
            along the latents, and along the rows of a batch; None puts all along the latents. The
            results are those of one process, up to rounding. The first process writes the folder,
            which all must be able to read; another number of processes can resume it.

    Raises:
        ValueError: the config does not fit the activations.
        DataError: a file of activations is missing, damaged or of another width.
        RunError, CheckpointError, TrainingError: see sparsekern.training.
        BackendUnavailableError: the forced backend cannot run here.
        ModuleNotFoundError: the packages of the extra "data" are not installed.
    """
    folder = Path(folder)
    config = prepared(config, several_processes=True)
    with (
        job(mesh, config.device) as processes,
        backend(config.backend),
        Rows(config) as rows,
    ):
        first = processes is None or processes.first
        device = usable_device(config.device)
        if first and not resume:
            RunFolder.check_new(folder)
        for text in rows.warnings() if first else ():
            warnings.warn(text, stacklevel=2)
        identity = _identity(config, rows)
        if processes is not None:
            processes.check_same({"versions": describe()["versions"], **identity})
        task = SAETask(config, rows, device, processes and processes.device_mesh(device))
        _try_backend(task)
        if config.init_from is not None and not (resume and (folder / checkpoints.FACTS).exists()):
            _start_from_run(task.model, config.init_from, rows, processes)
        with run_folder(
            folder, NAME, config, resume=resume, on_metrics=on_metrics, first=first
        ) as opened:
            if resume:
                identity = _resumed_identity(opened, config, identity, extend, first)
            if processes is not None:
                processes.largest(0)  # the folder is as the first process has left it
            outcome = train(task, config.loop(), opened, identity=identity, processes=processes)
            if outcome.signal is not None:
                return RunResult(outcome, None)
            results = _collect_results(config, task, outcome)
            if not first:
                return RunResult(outcome, results)
            text = json.dumps(results, indent=2) + "\n"
            write_atomically(opened.path / RESULTS, text.encode())
            figures.save_sae_history(
                opened.path / "history.png", opened.read_metrics("step"), config.batch_size
            )
    return RunResult(outcome, results)


# -- what belongs to a checkpoint ------------------------------------------------------------------


def _identity(config: SAEConfig, rows: Rows) -> dict[str, Any]:
    """Collect what must be equal when a run goes on: settings, and what the activations are."""
    return {**config.identity(), **rows.facts, DIGEST: activation_digest(rows.store)}


def activation_digest(store: ActivationStore) -> str:
    """Hash some rows with SHA-256, the same in whatever files and formats they lie.

    They are pieces of 64 neighbouring rows, evenly from the first to the last, about 64 MiB as
    float32 and at least 64 of them; all rows where there are no more than that.
    """
    digest = hashlib.sha256()
    rows = store.tokens + store.held_out + store.skipped + store.outliers
    pieces = -(-rows // PIECE)
    wanted = max(LEAST_PIECES, DIGEST_BYTES // (4 * PIECE * store.features))
    for number in sorted({round(i * (pieces - 1) / (wanted - 1)) for i in range(wanted)}):
        start = number * PIECE
        piece = store.stored_rows(start, min(start + PIECE, rows))
        digest.update(piece.float().numpy().tobytes())
    return digest.hexdigest()


def _resumed_identity(
    opened: RunFolder, config: SAEConfig, identity: dict[str, Any], extend: bool, first: bool
) -> dict[str, Any]:
    """Compare a run with its checkpoint; return the identity to go on with.

    The config in the folder is brought up to date where the data has moved or the run is extended;
    by the first process.
    """
    saved = checkpoints.read_checkpoint(opened.path)
    if saved is not None:
        saved.tensors.close()
        checkpoints.check_facts(opened.path, saved.facts, {"identity": dict})
        saved_identity = saved.facts["identity"]
        if "activations" in saved_identity:  # an earlier version's: files by name
            del identity[DIGEST]
            identity["activations"] = saved_identity["activations"]
        epochs = saved_identity.get("epochs", 0)
        longer = extend and isinstance(epochs, int) and config.epochs > epochs
        checkpoints.check_same(
            opened.path, saved_identity, {**identity, "epochs": epochs} if longer else identity
        )
        if longer and first:
            checkpoints.change_identity(opened.path, {"epochs": config.epochs})
            (opened.path / RESULTS).unlink(missing_ok=True)
    stored = RunFolder.read_config(opened.path)
    files = {name: list(getattr(config, name)) for name in ("activations", "eval_activations")}
    current = {**files, "epochs": config.epochs}
    changed = {**stored, "config": {**stored["config"], **current}}
    if changed != stored:
        opened.rewrite_config(changed)
    return identity


# -- the weights of a run --------------------------------------------------------------------------


class TrainedRun(NamedTuple):
    """A trained sparse autoencoder and what it was trained for."""

    model: SparseAutoencoder
    """In evaluation mode."""
    config: SAEConfig
    threshold: Tensor | None
    """That a score must exceed: 0-d for batchtopk, [latents] for jumprelu; None for others."""
    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """What the checkpoint belongs to: the settings, and tokens and features of the activations."""


class SavedSize(NamedTuple):
    """The size of the data of a run, as its checkpoint knows it."""

    features: int
    tokens: int


def load_run(folder: str | Path, *, device: str | torch.device = "cpu") -> TrainedRun:
    """Load the model of a run of ``sparsekern train sae``, ready to use, without activations.

    It takes activations as they are in the files: the factor of `normalize` "dataset" is folded
    into its weights. With "token", rows have to be normalised before.

    Args:
        folder: of the run.
        device: where the model shall be.

    Raises:
        RunError: there is no run of this study, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged, or the folder's config is not its own.

    Example::

        trained = load_run("runs/sae-20260101-120000")
        values, indices = trained.model.encode(activations)
    """
    folder = Path(folder)
    config = saved_config(folder)
    saved = checkpoints.read_checkpoint(folder)
    if saved is None:
        raise RunError(f"no checkpoint in {folder}: the run has not come to its first one")
    with contextlib.closing(saved.tensors):
        checkpoints.check_facts(folder, saved.facts, {"step": int, "identity": dict})
        facts = saved.facts["identity"]
        checkpoints.check_facts(folder, facts, {"features": int})
        own = config.identity()
        # Fields younger than the checkpoint say nothing of it; the others are of the activations.
        current = {name: own.get(name, value) for name, value in facts.items()}
        checkpoints.check_same(folder, facts, current)
        model = make_model(config, SavedSize(facts["features"], facts.get("tokens", 1)))
        checkpoints.load_model(folder, model, saved.tensors)
    model = model.to(device).eval()
    if config.normalize == "dataset":
        model.fold_normalization(facts["scale"])
    layer = model.activation
    threshold = layer.threshold if isinstance(layer, BatchTopK | JumpReLU) else None
    return TrainedRun(
        model,
        config,
        None if threshold is None else threshold.detach().clone(),
        saved.facts["step"],
        facts,
    )


def _start_from_run(
    model: SparseAutoencoder, folder: str, rows: Rows, processes: Processes | None = None
) -> None:
    """Give a new model the weights of a run, in the units of these rows.

    Its latents count as alive.

    Where one of both normalises each token, and the other does not, the factors of the tokens are
    taken as one, their mean.

    Raises:
        ValueError: a parameter has another name or shape there.
    """
    trained = load_run(folder)
    saved_state, new_state = trained.model.state_dict(), model.state_dict()
    for name in sorted(new_state.keys() | saved_state.keys()):
        saved_shape, new_shape = (
            (processes or Processes()).saved_shape(state[name]) if name in state else "absent"
            for state in (saved_state, new_state)
        )
        if saved_shape != new_shape:
            raise SettingError(
                "init_from",
                f"must name a run of such a model: {name} is {saved_shape} there, {new_shape} here",
            )
    model.load_state_dict(saved_state)
    model.counter.reset()
    factor = rows.mean_factor
    if trained.config.normalize == "token":  # others take activations as they are
        factor = factor / rows.mean_token_factor
    model.fold_normalization(1 / factor)


def _try_backend(task: SAETask) -> None:
    """Run a step of a tiny model: a backend that cannot run fails before anything is written."""
    model = SparseAutoencoder(4, 8, 2).to(task.device)
    with autocast(task.config, task.device):
        _, loss = model.loss(torch.zeros(2, 4, device=task.device))
    loss.total.backward()


def _collect_results(config: SAEConfig, task: SAETask, outcome: Outcome) -> dict[str, Any]:
    """Measure a finished run."""
    task._schedule(config.epochs * task.steps_per_epoch - 1)
    return {
        "activations": list(config.activations),
        "tokens": task.rows.tokens * config.epochs,
        "outliers": task.rows.store.outliers,
        "features": task.rows.features,
        "latents": task.model.encoder_bias.numel(),
        **({"k": task.model.k} if config.has_k else {}),
        **({} if config.steered_l0 is None else {"target_l0": config.steered_l0}),
        **({"scale": task.rows.scale} if config.normalize == "dataset" else {}),
        "auxk": task.model.auxk,
        "dead_after": task.model.dead_after,
        "measured_on": task.rows.measured_on,
        **evaluate(config, task.model, task.rows, task.device),
        "steps": outcome.step,
        "tokens_per_second": outcome.examples_per_second,
        "device": task.device.type,
        "backends": backends_of(OPERATIONS, task.device.type),
        "warnings": task.rows.warnings(),
    }


def evaluate_run(
    folder: str | Path, activations: tuple[str, ...] = (), *, device: str = "auto"
) -> dict[str, Any]:
    """Measure the checkpoint of a run folder, on its own activations or on others.

    Returns:
        step and epochs of the training, latents, and what `evaluate` returns.

    Raises:
        RunError: there is no run of this study, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged, or config or activations are not its own.
        DataError, ValueError: see `run`.
    """
    folder = Path(folder)
    torch_device = usable_device(device)
    model, config, _, step, facts = load_run(folder, device=torch_device)
    if activations:
        config = replace(config, activations=activations, eval_activations=activations)
    # The model takes activations as they are, except with "token".
    fixed = {"scale": 1.0, "max_norm": facts.get("max_norm")}
    with backend(config.backend), Rows(config, fixed) as rows:
        store = rows.store
        if store.features != facts["features"]:
            raise ValueError(
                f"activations must have the {facts['features']} features that {folder} was trained "
                f"on, got {store.features}"
            )
        if not activations:
            own = _identity(config, rows)
            names = ("tokens", DIGEST)
            checkpoints.check_same(
                folder,
                {n: facts[n] for n in names if n in facts},
                {n: own[n] for n in names if n in facts},
            )
        measured = evaluate(config, model, rows, torch_device)
    done = {"step": step}
    if "tokens" in facts:
        done["epochs"] = step / -(-facts["tokens"] // config.batch_size)
    return {**done, "latents": len(model.dictionary), **measured}


def _label(name: str) -> str:
    """Name a measurement for people."""
    first = name.removeprefix("fvu_")
    return f"FVU of the first {first} latents" if first.isdigit() else LABELS.get(name, name)


def _format(name: str, value: Any) -> str:
    """Format a measurement for people."""
    return (FVU_FORMAT if name.startswith("fvu") else FORMATS.get(name, "{}")).format(value)


def comparison(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Compare measurements of several runs in one table, a row each.

    Args:
        measured: by run; what `evaluate_run` returns.
    """
    names = list(dict.fromkeys(name for results in measured.values() for name in results))
    rows = [["run", *map(_label, names)]]
    for run, results in measured.items():
        cells = [_format(name, results[name]) if name in results else "" for name in names]
        rows.append([run, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def table(results: Mapping[str, Any], config: SAEConfig) -> str:
    """Format the final measurements for a terminal."""
    return measurements(results, f"Sparse autoencoder on {', '.join(config.activations)}")


def measurements(results: Mapping[str, Any], title: str) -> str:
    """Format named measurements for a terminal."""
    rows = [
        (_label(name), _format(name, value))
        for name, value in results.items()
        if not isinstance(value, (dict, list))
    ]
    rows += [(f"{name} by", name_of) for name, name_of in results.get("backends", {}).items()]
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def saved_config(folder: str | Path) -> SAEConfig:
    """Read the config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    return read_config(folder, NAME, SAEConfig)
