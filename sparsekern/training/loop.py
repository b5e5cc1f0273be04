"""The training loop: epochs of batches, logged, interruptible and resumable.

It knows no model: everything particular is behind :class:`Task`. The batches follow from the number
of their epoch alone, the random state is part of the checkpoint, and metrics logged after the
checkpoint are dropped on resuming. So a run that was interrupted any number of times, by a signal
or a kill, ends with the same bits as one that was not (on one machine, with one thread count).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .._system import require, stop_signals
from . import checkpoints
from .finite import (
    FiniteSteps,
    TrainingError,
    check_finite_state,
    divergence_error,
    nonfinite_names,
)
from .processes import Processes
from .runs import RunError, RunFolder

# The facts of a checkpoint, with their types; the first are those of _Position.
POSITION = {"step": int, "epoch": int, "batch": int, "seconds": float, "seen": int}
FACTS = {**POSITION, "identity": dict, "metrics_bytes": int, "optimizer": dict}


class Task(Protocol):
    """What the loop needs to know about a model and its data."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model's parameters."""

    @property
    def examples(self) -> int:
        """Number of training examples in an epoch."""

    @property
    def unit(self) -> str:
        """What an example is called, such as "image" or "token"; its plural ends in s."""

    def begin_epoch(self, epoch: int) -> Mapping[str, float]:
        """Apply schedules, which may depend on the epoch only; return facts to log with it."""

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield the epoch's batches from number ``first`` on; a pure function of its arguments.

        ``len(batch)`` is the number of its examples: ``LoopConfig.batch_size``, and in the last
        batch what is left of ``examples``. May not use torch's default generator. The loop takes no
        more batches than it needs, then calls the iterator's ``close()``, if it has one; also when
        the epoch is left early, by an interruption or an error.
        """

    def backward(self, batch: Any) -> Mapping[str, Tensor]:
        """Add the gradients of the batch's loss to the parameters.

        Returns detached scalars to log, "loss" among them: means over the batch's examples.
        """

    def evaluate(self, epoch: int) -> Mapping[str, float]:
        """Measure after an epoch.

        May not use torch's default generator, nor change what training goes on from: thresholds
        that only evaluation uses may be set, and after the last epoch any; the checkpoint that
        follows holds them.
        """


@dataclass(frozen=True)
class LoopConfig:
    """How to train. Every field changes the numbers, except the last three."""

    epochs: int
    """Passes over the examples, >= 1."""
    batch_size: int
    """Examples a step, >= 1; the last step of an epoch takes what is left."""
    seed: int = 0
    """Of torch's generators; a task's batches should depend on it, too."""
    log_every: int = 10
    """Steps between two logged steps, >= 1."""
    checkpoint_every: int = 500
    """Steps between two checkpoints inside an epoch, >= 1; there is one after each epoch anyway."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LoopConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.seed < 0:
            raise ValueError(f"LoopConfig: seed must be at least 0, got {self.seed}")


class Outcome(NamedTuple):
    """How training ended."""

    step: int
    """Optimizer steps done, over all sessions of the run."""
    examples_per_second: float
    """Of training alone, without evaluation and checkpoints, over all sessions of the run."""
    signal: int | None
    """The signal that interrupted training, or None when it is complete."""


@dataclass
class _Position:
    """Where the loop stands; what a checkpoint holds besides model, optimizer and random state."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    seen: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    """Sums over this epoch's examples, float64 scalars."""


def train(
    task: Task,
    config: LoopConfig,
    run: RunFolder,
    *,
    identity: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
) -> Outcome:
    """Train from the run folder's checkpoint, or from the start if it has none.

    Logs records of two kinds: "step" with the scalars of one step, and "epoch" with their means
    over the epoch, what ``begin_epoch`` and ``evaluate`` return, and the speed. SIGINT and SIGTERM
    let the current step finish, write a checkpoint and end training; a second one acts as if there
    were no loop. When training is complete, in this session or an earlier one, the model is in
    evaluation mode and under the schedules of the last epoch.

    Training ends with an error in the first step whose loss, gradients or parameters are not finite
    (on a GPU in the step after it), and no such state is saved: the last checkpoint is a finite
    one.

    Args:
        task: model, optimizer and data.
        config: how to train.
        run: an open run folder.
        identity: what must be equal for a checkpoint to fit (JSON types); saved with it.
        processes: that train together; all must call this. A signal to one of them ends all at the
            same step.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model or identity.
        TrainingError: loss, gradients, parameters, the optimizer's state or a measurement is not
            finite, or the task's batches are not as they should be.
    """
    device = next(task.model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), stop_signals() as stop:
        # Not the seed itself, which callers use for the initial weights.
        torch.manual_seed(int(np.random.SeedSequence(config.seed).generate_state(1)[0]))
        loop = _Loop(task, config, run, device, dict(identity or {}), processes or Processes())
        loop.restore()
        if loop.position.epoch >= config.epochs:
            # Nothing is left to do, but the caller finds the task as the last epoch leaves it.
            task.begin_epoch(loop.position.epoch - 1)
            task.model.eval()
        with loop.progress_bar() as bar:
            while loop.position.epoch < config.epochs and not loop.told_to_end(stop):
                loop.epoch(stop, bar)
    position = loop.position
    rate = position.seen / position.seconds if position.seconds else 0.0
    complete = position.epoch >= config.epochs
    return Outcome(position.step, rate, None if complete else loop.signal)


class _Loop:
    """One call of :func:`train`: the task, where it stands, and its checkpoints."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        run: RunFolder,
        device: torch.device,
        identity: dict[str, Any],
        processes: Processes,
    ) -> None:
        self.task, self.config, self.run, self.device = task, config, run, device
        self.identity, self.processes = identity, processes
        self.signal: int | None = None
        self.batches_per_epoch = math.ceil(task.examples / config.batch_size)
        self.position = _Position()
        self.clock = 0.0
        self.finite = FiniteSteps(task.model, processes)
        # Buffers that begin so, such as a threshold before its first batch.
        self.unset = nonfinite_names(self._saved_buffers(), processes)

    def told_to_end(self, stop: list[int]) -> bool:
        """Tell whether training must end here, in all processes alike; note the signal, if any.

        stop: signals that this process got.
        """
        return self._noted(*self.processes.largest(*self._reasons(stop)))

    def _reasons(self, stop: list[int]) -> tuple[int, int]:
        """Return this process's reasons to end: a signal, and that the metrics' function failed."""
        return stop[0] if stop else 0, int(self.run.failed is not None)

    def _noted(self, signal: int, failed: int) -> bool:
        """Tell whether training must end, from the reasons of all; note the signal, if any."""
        self.signal = signal or None
        return bool(signal or failed)

    def progress_bar(self) -> Any:
        """Make the progress bar, in examples of all epochs."""
        return require("tqdm", "training").tqdm(
            total=self.task.examples * self.config.epochs,
            initial=self.position.seen,
            unit=f" {self.task.unit}s",
            unit_scale=True,
            disable=not (self.config.progress and self.processes.first),
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def epoch(self, stop: list[int], bar: Any) -> None:
        """Run what is left of the current epoch, or less when asked to stop."""
        position, config = self.position, self.config
        facts = dict(self.task.begin_epoch(position.epoch))
        bar.set_description(f"epoch {position.epoch + 1}/{config.epochs}", refresh=False)
        self.task.model.train()
        self.clock = time.perf_counter()
        with _closing_if_possible(self.task.batches(position.epoch, position.batch)) as batches:
            while position.batch < self.batches_per_epoch:
                batch = self._next_batch(batches)
                ends = self._train_batch(batch, stop, bar)
                bar.update(len(batch))
                if position.batch == self.batches_per_epoch:
                    break
                if ends or position.batch % config.checkpoint_every == 0:
                    position.seconds += time.perf_counter() - self.clock
                    self.save()
                    self._raise_metrics_error()
                    if ends:
                        return
                    self.clock = time.perf_counter()
        self._end_epoch(facts)

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        """Take the next batch, which must have the size it should."""
        epoch, number, unit = self.position.epoch, self.position.batch, self.task.unit
        try:
            batch = next(batches)
        except StopIteration:
            raise TrainingError(
                f"the batches of epoch {epoch} end after {number} of {self.batches_per_epoch}"
            ) from None
        left = self.task.examples - number * self.config.batch_size
        if len(batch) != (size := min(self.config.batch_size, left)):
            raise TrainingError(
                f"batch {number} of epoch {epoch} has {len(batch)} {unit}s instead of {size}"
            )
        return batch

    def _train_batch(self, batch: Any, stop: list[int], bar: Any) -> bool:
        """Train on a batch; add up its scalars and log them; tell whether training must end."""
        position = self.position
        self.task.optimizer.zero_grad(set_to_none=True)
        scalars = self.task.backward(batch)
        gradients = self.finite.gradients()
        self.task.optimizer.step()
        # What ends training is asked in the same message, so that processes wait once.
        reasons = self.finite.watch(
            position.step + 1, scalars["loss"], gradients, *self._reasons(stop)
        )
        for name, value in scalars.items():
            share = value.double() * len(batch)
            position.totals[name] = (
                position.totals[name] + share if name in position.totals else share
            )
        position.seen += len(batch)
        position.batch += 1
        position.step += 1
        if position.step % self.config.log_every == 0 or position.step == 1:
            numbers = {
                name: self._require_finite(name, float(value)) for name, value in scalars.items()
            }
            self.run.log(
                {"kind": "step", "step": position.step, "epoch": position.epoch, **numbers}
            )
            bar.set_postfix(loss=f"{numbers['loss']:.4g}", refresh=False)
            return self.told_to_end(stop)  # the metrics' function may have failed just now
        return self._noted(*reasons)

    def _require_finite(self, name: str, value: float) -> float:
        """Return a value; raise TrainingError where it is not finite."""
        if not math.isfinite(value):
            raise divergence_error(name, value, self.position.step)
        return value

    def _end_epoch(self, facts: dict[str, float]) -> None:
        """Measure after an epoch, log it, and save a checkpoint."""
        position = self.position
        self.finite.settle()
        means = {
            name: self._require_finite(name, float(total) / self.task.examples)
            for name, total in position.totals.items()
        }
        position.seconds += time.perf_counter() - self.clock
        self.task.model.eval()
        measured = self.task.evaluate(position.epoch)
        for name, value in measured.items():
            if isinstance(value, float):
                self._require_finite(name, value)
        self.run.log(
            {
                "kind": "epoch",
                "epoch": position.epoch,
                "step": position.step,
                **facts,
                **means,
                **measured,
                "examples_per_second": position.seen / position.seconds,
            }
        )
        position.epoch, position.batch, position.totals = position.epoch + 1, 0, {}
        self.save()
        self._raise_metrics_error()

    def _raise_metrics_error(self) -> None:
        """End training with what the caller's function of the metrics raised."""
        failed = self.processes.largest(int(self.run.failed is not None))[0]
        if self.run.failed is not None:
            raise self.run.failed
        if failed:
            raise RunError("the function of the metrics failed in the first process")

    def _saved_buffers(self) -> dict[str, Tensor]:
        """Name what a checkpoint holds of the model besides its parameters."""
        parameters = {f"model.{name}" for name, _ in self.task.model.named_parameters()}
        tensors = checkpoints.model_tensors(self.task.model)
        return {name: tensor for name, tensor in tensors.items() if name not in parameters}

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite."""
        position = self.position
        self.finite.settle()
        tensors, optimizer = checkpoints.optimizer_state(self.task.optimizer)
        tensors |= checkpoints.model_tensors(self.task.model)
        tensors |= {f"total.{name}": total for name, total in position.totals.items()}
        check_finite_state(tensors, position.step, self.unset, self.processes)
        self.unset &= nonfinite_names(self._saved_buffers(), self.processes)
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "identity": self.identity,
            **{name: getattr(position, name) for name in POSITION},
            "metrics_bytes": self.run.sync_metrics(),
            "optimizer": optimizer,
        }
        checkpoints.write_checkpoint(self.run.path, position.step, tensors, facts, self.processes)

    def restore(self) -> None:
        """Load the checkpoint of the run folder, if there is one."""
        saved = checkpoints.read_checkpoint(self.run.path)
        if saved is None:
            self.run.rewind_metrics(0)
            return
        with contextlib.closing(saved.tensors):
            self._restore_state(saved.tensors, saved.facts)

    def _restore_state(self, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Set model, optimizer and position as a checkpoint has them."""
        folder = self.run.path
        checkpoints.check_facts(folder, facts, FACTS)
        checkpoints.check_same(folder, facts["identity"], self.identity)
        if facts["batch"] >= self.batches_per_epoch:
            reason = f"'batch' is {facts['batch']}, an epoch has {self.batches_per_epoch} batches"
            raise checkpoints.damaged(folder, reason)
        checkpoints.load_model(folder, self.task.model, tensors, self.processes)
        checkpoints.load_optimizer(
            folder, self.task.optimizer, tensors, facts["optimizer"], self.processes
        )
        self.unset = nonfinite_names(self._saved_buffers(), self.processes)
        totals = {
            name.removeprefix("total."): tensors[name].to(self.device)
            for name in tensors
            if name.startswith("total.")
        }
        self.position = _Position(**{name: facts[name] for name in POSITION}, totals=totals)
        try:
            torch.set_rng_state(tensors["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise checkpoints.damaged(folder, error) from error
        self.run.rewind_metrics(facts["metrics_bytes"])


@contextmanager
def _closing_if_possible(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close the iterator at the end, if it can be closed."""
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
