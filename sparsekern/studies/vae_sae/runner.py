"""Trains the cells of a reproduction, several at a time, each in a process of its own.

A cell is a run folder. One that is finished is kept, one that was interrupted goes on, and one that
another process trains is left to it for a while; so a reproduction that was killed at any moment is
started again with the same command, and no cell counts twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ...training import RunError
from .config import VAESAEConfig
from .grid import Cell
from .run import saved_config

CELLS = "cells"
POLL_SECONDS = 0.5


@dataclass
class _Process:
    cell: Cell
    process: subprocess.Popen[str]
    log: IO[str]


@dataclass
class Ended:
    """How the cells of a call ended."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Cell's name -> why."""
    signal: int | None = None
    """The signal that interrupted the call."""


def cell_folder(folder: Path, cell: Cell) -> Path:
    """The run folder of a cell."""
    return folder / CELLS / cell.name


def is_finished(folder: Path, cell: Cell, config: VAESAEConfig) -> bool:
    """Whether a cell has its results.

    Raises:
        RunError: its folder holds a run with other settings.
    """
    place = cell_folder(folder, cell)
    if not (place / "config.json").exists():
        return False
    there, here = saved_config(place).identity(), config.identity()
    for name, value in here.items():
        if there[name] != value:
            raise RunError(
                f"cell {cell.name} in {folder} was run with {name} {there[name]!r}, not {value!r}: "
                "name another folder"
            )
    return (place / "results.json").exists()


def run_cells(
    folder: Path, configs: Mapping[Cell, VAESAEConfig], *, jobs: int, progress: bool
) -> Ended:
    """Trains what is not finished yet.

    Args:
        folder: of the reproduction.
        configs: what to run, in this order.
        jobs: processes at a time, >= 1; they share the processors.
        progress: show one bar for all.

    Raises:
        RunError: a cell's folder holds a run with other settings; nothing was started.
    """
    done = {cell: is_finished(folder, cell, config) for cell, config in configs.items()}
    ended = Ended([cell for cell, finished in done.items() if finished])
    waiting = [cell for cell, finished in done.items() if not finished]
    threads = max(1, usable_processors() // min(jobs, max(1, len(waiting))))
    running: list[_Process] = []
    with _stopping() as stop, _bar(folder, configs, progress) as show:
        while waiting or running:
            while waiting and len(running) < jobs and not stop:
                cell = waiting.pop(0)
                running.append(_start(folder, cell, configs[cell], threads))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _close(job, folder, ended)
            if stop:
                ended.signal = stop[0]
                waiting.clear()
                for job in running:
                    job.process.send_signal(signal.SIGTERM)
                for job in running:
                    job.process.wait()
                    _close(job, folder, ended)
                return ended
            show()
            time.sleep(POLL_SECONDS)
        show()
    return ended


def usable_processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(folder: Path, cell: Cell, config: VAESAEConfig, threads: int) -> _Process:
    place = cell_folder(folder, cell)
    place.parent.mkdir(parents=True, exist_ok=True)
    log = open(place.with_suffix(".log"), "w")
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.worker"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        text=True,
        # A terminal's Ctrl-C reaches this process alone, which tells the others.
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    job = {"folder": str(place), "config": asdict(config), "threads": threads}
    if process.stdin is None:
        raise RuntimeError("a worker has no stdin")
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it failed at once; its log says why
    return _Process(cell, process, log)


def _close(job: _Process, folder: Path, ended: Ended) -> None:
    """Notes how a cell's process ended."""
    job.log.close()
    if job.process.stdin is not None:
        try:
            job.process.stdin.close()
        except BrokenPipeError:
            pass
    log = cell_folder(folder, job.cell).with_suffix(".log")
    code = job.process.returncode
    if code == 0:
        ended.finished.append(job.cell)
        log.unlink(missing_ok=True)
    elif ended.signal is None:
        lines = log.read_text(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"its process ended with code {code}"
        ended.failed[job.cell.name] = said
    else:
        log.unlink(missing_ok=True)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; in the main thread only."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda number, frame: stop.append(number)) for number in numbers
    ]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _bar(folder: Path, configs: Mapping[Cell, VAESAEConfig], progress: bool) -> Iterator[Any]:
    """A function that brings a bar of epochs up to date."""
    from tqdm import tqdm

    total = sum(config.all_epochs for config in configs.values())
    bar = tqdm(
        total=total,
        unit=" epochs",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
    )

    def show() -> None:
        counts = [epochs_done(cell_folder(folder, cell)) for cell in configs]
        finished = sum(n == c.all_epochs for n, c in zip(counts, configs.values(), strict=True))
        bar.set_description(f"{finished}/{len(configs)} cells", refresh=False)
        bar.update(sum(counts) - bar.n)

    with bar:
        if progress:
            show()
        yield show if progress else lambda: None


def epochs_done(place: Path) -> int:
    """Epochs that a cell has logged."""
    try:
        with open(place / "metrics.jsonl", "rb") as file:
            return sum(line.startswith(b'{"kind": "epoch"') for line in file)
    except FileNotFoundError:
        return 0


def read_cells(folder: Path, wanted: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The finished ones with their config, results and epoch records."""
    found = {}
    for cell in wanted:
        place = cell_folder(folder, cell)
        if not (place / "results.json").exists():
            continue
        with open(place / "metrics.jsonl") as file:
            records = [json.loads(line) for line in file if line.startswith('{"kind": "epoch"')]
        found[cell] = {
            "config": asdict(saved_config(place)),
            "results": json.loads((place / "results.json").read_text()),
            "epochs": records,
        }
    return found
