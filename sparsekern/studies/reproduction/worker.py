"""A process that trains cells of a reproduction, one after the other.

Reads one line of JSON from stdin for each cell: folder, config. Answers each on stdout with
a line of JSON: signal (null, or what interrupted it) and error (null, or why it failed). What the
cells print goes to stderr. When stdin ends, whoever started it is gone or has no more work: it
saves and stops, as it does after SIGTERM.

One process for many cells, because to start one and to trace the scenes of Shapes3D takes longer
than an epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

LOCK_SECONDS = 30.0


def main(study: ModuleType, threads: int) -> None:
    """Serve cells of a study until stdin ends, with so many threads."""
    import torch

    torch.set_num_threads(threads)
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    answers = sys.stdout
    while (job := jobs.get()) is not None:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _answer(study, Path(job["folder"]), job["config"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(jobs: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Pass jobs on; at the end of stdin, interrupt what is running."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(study: ModuleType, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a cell and say how that ended."""
    from ..runs import EXPECTED_ERRORS

    try:
        return {"signal": _train(study, folder, settings), "error": None}
    except EXPECTED_ERRORS as error:
        return {"signal": None, "error": " ".join(str(error).split())}


def _train(study: ModuleType, folder: Path, settings: dict[str, Any]) -> int | None:
    """Train a cell, or go on with it; return the signal that interrupted it, if any."""
    from ...training import RunError

    config = study.Config(**settings)
    resume = (folder / "config.json").exists()
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            signal: int | None = study.run(config, folder, resume=resume).outcome.signal
            return signal
        except RunError as error:
            # One that was told to stop a moment ago may still be saving.
            if "another process" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.2)
            resume = True
