"""Trains the cells of a grid, several at a time, in processes that take one after another.

A cell is a run of the study, in a folder. One that is finished is kept, one that was interrupted
goes on, and one that another process trains is left to it for a while; so a reproduction that was
killed at any moment is started again with the same command, and no cell counts twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol, TypeVar

from ..._system import open_plain, require
from ...training import RunError, stop_signals
from ...training.runs import read_metrics

CELLS = "cells"
POLL_SECONDS = 0.5


class Cell(Protocol):
    """A cell of a grid; hashable."""

    @property
    def name(self) -> str:
        """Of its folder."""


class CellConfig(Protocol):
    """What a cell runs, a dataclass."""

    @property
    def all_epochs(self) -> int:
        """Epochs that a finished run has logged."""

    def identity(self) -> dict[str, Any]:
        """Collect the fields that must be equal when a run is resumed."""


AnyCell = TypeVar("AnyCell", bound=Cell)


@dataclass
class GridOutcome:
    """How the cells of a call ended."""

    finished: list[Any] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Cell's name -> why."""
    signal: int | None = None
    """The signal that interrupted the call."""


def cell_folder(folder: Path, cell: Cell) -> Path:
    """Name the run folder of a cell."""
    return folder / CELLS / cell.name


def is_finished(study: ModuleType, folder: Path, cell: Cell, config: CellConfig) -> bool:
    """Tell whether a cell has its results.

    Raises:
        RunError: its folder holds a run with other settings.
    """
    cell_path = cell_folder(folder, cell)
    if not (cell_path / "config.json").exists():
        return False
    saved, wanted = study.saved_config(cell_path).identity(), config.identity()
    for name, value in wanted.items():
        if saved[name] != value:
            raise RunError(
                f"cell {cell.name} in {folder} was run with {name} {saved[name]!r}, not {value!r}: "
                "name another folder"
            )
    return (cell_path / "results.json").exists()


def run_cells(
    study: ModuleType,
    folder: Path,
    configs: Mapping[AnyCell, Any],
    finished: Sequence[AnyCell],
    *,
    jobs: int,
    progress: bool,
) -> GridOutcome:
    """Train what is not finished yet.

    Args:
        study: its package, with Config, run and saved_config.
        folder: of the reproduction.
        configs: what to run, in this order; each a :class:`CellConfig`.
        finished: those of them that have their results; see :func:`is_finished`.
        jobs: processes at a time, >= 1; they share the processors.
        progress: show one bar for all.
    """
    outcome = GridOutcome(list(finished))
    waiting = deque(cell for cell in configs if cell not in finished)
    # Whatever is finished already: the number of threads changes the last bits.
    threads = max(1, usable_processors() // jobs)
    with stop_signals() as stop, _progress_bar(folder, configs, progress) as show:
        workers = [_Worker(study, folder, configs, waiting, outcome, threads) for _ in range(jobs)]
        while any(worker.thread.is_alive() for worker in workers):
            if stop and outcome.signal is None:
                outcome.signal = stop[0]
                waiting.clear()
                for worker in workers:
                    worker.interrupt()
            show()
            time.sleep(POLL_SECONDS)
        show()
    if outcome.signal is None:
        for cell in configs:
            if cell not in outcome.finished and cell.name not in outcome.failed:
                outcome.failed[cell.name] = "nobody ran it: a worker broke down"
    return outcome


class _Worker:
    """Hands cells to a process, and notes how they end; a process that dies is replaced.

    Args:
        study: of the cells.
        folder: of the reproduction.
        configs: of the cells.
        waiting: cells nobody has taken yet; shared with the other workers.
        ended: where to note; shared with the other workers.
        threads: of the process.
    """

    def __init__(
        self,
        study: ModuleType,
        folder: Path,
        configs: Mapping[Any, Any],
        waiting: deque[Any],
        ended: GridOutcome,
        threads: int,
    ) -> None:
        self.study, self.folder, self.configs, self.threads = study, folder, configs, threads
        self.waiting, self.ended = waiting, ended
        self.process: subprocess.Popen[str] | None = None
        self.interrupted = False
        self.thread = threading.Thread(target=self._train_waiting, daemon=True)
        self.thread.start()

    def _train_waiting(self) -> None:
        """Serve cells until none is waiting."""
        log = tempfile.TemporaryFile("w+")
        with log:
            while not self.interrupted:
                try:
                    cell = self.waiting.popleft()
                except IndexError:
                    break
                self._train_cell(cell, log)
            self._close()

    def interrupt(self) -> None:
        """Let the process save and stop."""
        self.interrupted = True
        process = self.process
        if process is not None:
            process.send_signal(signal.SIGTERM)

    def _train_cell(self, cell: Cell, log: IO[str]) -> None:
        """Hand a cell to the process and note how it ends."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._start_process(log)
        cell_path = cell_folder(self.folder, cell)
        cell_path.parent.mkdir(parents=True, exist_ok=True)
        job = {"folder": str(cell_path), "config": asdict(self.configs[cell])}
        answer = _train_in(self.process, job)
        if answer is None:
            if not self.interrupted:
                self.ended.failed[cell.name] = _exit_message(self.process, log)
            self.process = None
        elif answer["error"] is not None:
            self.ended.failed[cell.name] = answer["error"]
        elif answer["signal"] is None:
            self.ended.finished.append(cell)
        elif not self.interrupted:
            self.ended.failed[cell.name] = f"its process received signal {answer['signal']}"

    def _start_process(self, log: IO[str]) -> subprocess.Popen[str]:
        """Start a process that trains cells."""
        return subprocess.Popen(
            [sys.executable, "-c", _worker_program(self.study, self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # A terminal's Ctrl-C reaches this process alone, which tells the others.
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
        )

    def _close(self) -> None:
        """Close the process's input and wait for its end."""
        if self.process is not None and self.process.stdin is not None:
            # Not communicate(), which reads to the end while the process waits for its input's.
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()


def _worker_program(study: ModuleType, threads: int) -> str:
    """Write what a worker's process runs: this very package, whatever the current folder holds."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}; import {study.__name__} as study; "
        f"from {__package__}.worker import main; main(study, {threads})"
    )


def _train_in(process: subprocess.Popen[str], job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ask a worker's process to train a cell; return its answer, None when it died."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a worker has no pipes")
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _exit_message(process: subprocess.Popen[str], log: IO[str]) -> str:
    """Say how a process ended: its code, and the last line that it wrote."""
    process.wait()
    log.seek(0)
    lines = log.read().strip().splitlines()
    code = f"its process ended with code {process.returncode}"
    return f"{code}: {lines[-1]}" if lines else code


def usable_processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress_bar(folder: Path, configs: Mapping[Any, Any], progress: bool) -> Iterator[Any]:
    """Show a bar of epochs; yield a function that brings it up to date."""
    total = sum(config.all_epochs for config in configs.values())
    bar = require("tqdm", "reproducing a study").tqdm(
        total=total,
        unit=" epochs",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
    )

    counts = dict.fromkeys(configs, 0)

    def show() -> None:
        for cell, config in configs.items():
            if counts[cell] < config.all_epochs:
                counts[cell] = epochs_done(cell_folder(folder, cell))
        finished = sum(counts[cell] == config.all_epochs for cell, config in configs.items())
        bar.set_description(f"{finished}/{len(configs)} cells", refresh=False)
        bar.update(sum(counts.values()) - bar.n)

    with bar:
        if progress:
            show()
        yield show if progress else lambda: None


def epochs_done(run_path: Path) -> int:
    """Count the epochs that a cell has logged."""
    try:
        with open(run_path / "metrics.jsonl", "rb") as file:
            return sum(line.startswith(b'{"kind": "epoch"') for line in file)
    except FileNotFoundError:
        return 0


def read_cells(
    study: ModuleType, folder: Path, wanted: Sequence[AnyCell]
) -> dict[AnyCell, dict[str, Any]]:
    """Read the finished cells: config, results and epoch records of each."""
    finished = {}
    for cell in wanted:
        cell_path = cell_folder(folder, cell)
        if not (cell_path / "results.json").exists():
            continue
        try:
            with open_plain(cell_path / "results.json") as file:
                results = json.loads(file.read())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {cell_path / 'results.json'}: {error}") from error
        finished[cell] = {
            "config": asdict(study.saved_config(cell_path)),
            "results": results,
            "epochs": read_metrics(cell_path, "epoch"),
        }
    return finished
