"""A process that trains one cell of a reproduction.

Reads one line of JSON from stdin: folder, config, threads. When stdin ends, whoever started it is
gone: it saves and stops, as it does after SIGTERM. Exit codes: 0 done, 2 bad input (one line on
stderr), 128 + signal when interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

LOCK_SECONDS = 30.0


def main() -> int:
    """Trains the cell that stdin names; returns the exit code."""
    job = json.loads(sys.stdin.readline())
    import torch

    from ..configs import EXPECTED_ERRORS

    torch.set_num_threads(job["threads"])
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    try:
        return _train(Path(job["folder"]), job["config"])
    except EXPECTED_ERRORS as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2


def _stop_at_end_of_input() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(folder: Path, settings: dict) -> int:
    from ...training import RunError
    from .config import VAESAEConfig
    from .run import run, saved_config

    config = VAESAEConfig(**settings)
    resume = (folder / "config.json").exists()
    if resume and saved_config(folder).identity() != config.identity():
        raise RunError(f"folder {folder} holds a run with other settings")
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            report = run(config, folder, resume=resume)
            return 0 if report.outcome.signal is None else 128 + report.outcome.signal
        except RunError as error:
            # One that was told to stop a moment ago may still be saving.
            if "another process" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.2)
            resume = True


if __name__ == "__main__":
    sys.exit(main())
