"""Run folders: one folder holds one run, and one process at a time writes to it.

config.json      what was asked for; written once
metrics.jsonl    one JSON object a line, appended
checkpoint.json  the newest checkpoint, with the name of its tensor file (see checkpoints.py)
lock             held while a process trains here; the system drops it when the process dies
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from .._system import sync

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOCK = "lock"


class RunError(RuntimeError):
    """A run folder cannot be used; the message names the folder and the reason."""


class RunFolder:
    """An open run folder. Use it in a ``with`` statement, which releases the lock at the end."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._metrics: BinaryIO | None = None

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raises :class:`RunError` when :meth:`create` would, as far as one can tell by reading."""
        path = Path(path)
        if (path / CONFIG).exists():
            raise RunError(f"folder already holds a run: {path} (resume it or name another)")
        nearest = path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise RunError(f"cannot write to the run folder {path}: {nearest} is not a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RunError(f"cannot write to the run folder {path}: no permission in {nearest}")

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """Makes a folder for a new run, locks it and writes its config (JSON types only).

        Raises:
            RunError: the folder cannot be written, or holds a run already. Nothing is left behind.
        """
        path = Path(path)
        cls.check_new(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        run = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path))
            # Again, now that no other process can create a run here.
            cls.check_new(path)
            write_atomically(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        except BaseException as error:
            if run is not None:
                run.close()
            if isinstance(error, OSError):
                _remove_made(made, path)
                reason = error.strerror
                raise RunError(f"cannot write to the run folder {path}: {reason}") from error
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Opens and locks the folder of an earlier run.

        Raises:
            RunError: there is no run in it, it cannot be written, or another process trains in it.
        """
        path = Path(path)
        cls.read_config(path)
        try:
            return cls(path, _lock(path))
        except OSError as error:
            raise RunError(f"cannot write to the run folder {path}: {error.strerror}") from error

    @staticmethod
    def read_config(path: str | Path) -> dict[str, Any]:
        """The config of an earlier run.

        Raises:
            RunError: there is none, or it is not JSON.
        """
        path = Path(path)
        try:
            config = json.loads((path / CONFIG).read_text())
        except FileNotFoundError as error:
            raise RunError(f"no run in {path}: {CONFIG} not found") from error
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path / CONFIG}: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"cannot read {path / CONFIG}: not a JSON object")
        return config

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line to the metrics; durable after the next :meth:`sync_metrics`."""
        self._opened_metrics().write((json.dumps(record, allow_nan=False) + "\n").encode())

    def sync_metrics(self) -> int:
        """Makes the metrics durable and returns their length in bytes."""
        metrics = self._opened_metrics()
        metrics.flush()
        os.fsync(metrics.fileno())
        return metrics.tell()

    def rewind_metrics(self, length: int) -> None:
        """Drops what was logged after the first ``length`` bytes."""
        self._rewound_metrics(length)

    def _opened_metrics(self) -> BinaryIO:
        return self._rewound_metrics(0) if self._metrics is None else self._metrics

    def _rewound_metrics(self, length: int) -> BinaryIO:
        metrics = self._metrics = open(self.path / METRICS, "ab")
        if metrics.tell() < length:
            raise RunError(
                f"{self.path / METRICS} is shorter than the {length} bytes its checkpoint counts on"
            )
        metrics.truncate(length)
        metrics.seek(0, os.SEEK_END)
        return metrics

    def read_metrics(self, kind: str) -> list[dict[str, Any]]:
        """The logged records whose "kind" is this."""
        if self._metrics is not None:
            self._metrics.flush()
        return read_metrics(self.path, kind)

    def close(self) -> None:
        """Closes the metrics and releases the lock."""
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a run folder whose "kind" is this, as far as they are on the disk."""
    if not (path / METRICS).exists():
        return []
    with open(path / METRICS) as file:
        return [record for record in map(json.loads, file) if record["kind"] == kind]


def _lock(path: Path) -> FileLock:
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another process is training in {path}") from error
    return lock


def _remove_made(made: list[Path], path: Path) -> None:
    """Takes back the folders that a failed creation made, innermost first."""
    if path in made:
        (path / LOCK).unlink(missing_ok=True)
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file; a crash at any moment leaves the old content or the new, never a mix."""
    # One name for all: what a killed process left is overwritten by the next one's first write.
    temporary = path.with_name(".new")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
