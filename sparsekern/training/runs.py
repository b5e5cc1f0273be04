"""Run folders: one folder holds one run, and one process at a time writes to it.

config.json      what was asked for; written once
metrics.jsonl    one JSON object a line, appended
checkpoint.json  the newest checkpoint, with the name of its tensor file (see checkpoints.py)
lock             held while a process trains here; the system drops it when the process dies

What is written here never follows a symbolic link, and what is read is a plain file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .._system import lock_file, open_appending, open_plain, replaced

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOCK = "lock"


class RunError(RuntimeError):
    """A run folder cannot be used; the message names the folder and the reason."""


class RunFolder:
    """An open run folder. Use it in a ``with`` statement, which releases the lock at the end.

    Attributes:
        on_metrics: called with each record that is logged, after it was written; None for nothing.
            A resumed run logs the steps since its checkpoint again.
        failed: what it raised, for the training to end with after a checkpoint; not called again.
    """

    def __init__(self, path: Path, unlock: Callable[[], None]) -> None:
        self.path = path
        self._unlock = unlock
        self._metrics: BinaryIO | None = None
        self.on_metrics: Callable[[Mapping[str, Any]], object] | None = None
        self.failed: Exception | None = None

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raise :class:`RunError` when :meth:`create` would, as far as one can tell by reading."""
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
        """Make a folder for a new run, lock it and write its config (JSON types only).

        Raises:
            RunError: the folder cannot be written, or holds a run already. Nothing is left behind.
        """
        path = Path(path)
        cls.check_new(path)
        new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
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
                _remove_folders(new_folders, path)
                reason = error.strerror
                raise RunError(f"cannot write to the run folder {path}: {reason}") from error
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open and lock the folder of an earlier run.

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
        """Read the config of an earlier run.

        Raises:
            RunError: there is none, or it is not JSON.
        """
        path = Path(path)
        try:
            with open_plain(path / CONFIG) as file:
                config = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(f"no run in {path}: {CONFIG} not found") from error
        except (OSError, RecursionError, ValueError) as error:
            raise RunError(f"cannot read {path / CONFIG}: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"cannot read {path / CONFIG}: not a JSON object")
        return config

    @classmethod
    def followed(cls, path: str | Path) -> RunFolder:
        """Stand for a folder that another process of the same run writes: nothing is written."""
        return _FollowedFolder(Path(path), lambda: None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics; durable after the next :meth:`sync_metrics`."""
        self._open_metrics().write((json.dumps(record, allow_nan=False) + "\n").encode())
        if self.on_metrics is None or self.failed is not None:
            return
        try:
            self.on_metrics(record)
        except Exception as error:  # of whatever the caller has there
            self.failed = error

    def rewrite_config(self, config: Mapping[str, Any]) -> None:
        """Replace the config (JSON types only), when a run is extended or its data has moved."""
        write_atomically(self.path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    def sync_metrics(self) -> int:
        """Make the metrics durable and return their length in bytes."""
        metrics = self._open_metrics()
        metrics.flush()
        os.fsync(metrics.fileno())
        return metrics.tell()

    def rewind_metrics(self, length: int) -> None:
        """Drop what was logged after the first ``length`` bytes."""
        self._open_metrics_at(length)

    def _open_metrics(self) -> BinaryIO:
        return self._open_metrics_at(0) if self._metrics is None else self._metrics

    def _open_metrics_at(self, length: int) -> BinaryIO:
        try:
            metrics = self._metrics = open_appending(self.path / METRICS)
        except OSError as error:
            raise RunError(f"cannot write {self.path / METRICS}: {error.strerror}") from error
        if metrics.tell() < length:
            raise RunError(
                f"{self.path / METRICS} is shorter than the {length} bytes its checkpoint counts on"
            )
        metrics.truncate(length)
        metrics.seek(0, os.SEEK_END)
        return metrics

    def read_metrics(self, kind: str) -> list[dict[str, Any]]:
        """Read the logged records whose "kind" is this."""
        if self._metrics is not None:
            self._metrics.flush()
        return read_metrics(self.path, kind)

    def close(self) -> None:
        """Close the metrics and release the lock."""
        if self._metrics is not None:
            self._metrics.close()
        self._unlock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _FollowedFolder(RunFolder):
    """A run folder that another process writes."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def rewrite_config(self, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def sync_metrics(self) -> int:
        """Return 0."""
        return 0

    def rewind_metrics(self, length: int) -> None:
        """Do nothing."""


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read the records of a run folder whose "kind" is this, as far as they are on the disk.

    Raises:
        RunError: the file is damaged, or no plain file.
    """
    try:
        with open_plain(path / METRICS) as file:
            return [record for record in map(json.loads, file) if record["kind"] == kind]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read {path / METRICS}: {error}") from error


@contextmanager
def unused_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder of this name, or of the first free one of ``path-2``, ``path-3``, ....

    It is taken back when it is still empty at the end. Two processes that ask for the same name at
    the same moment get two folders.

    Two processes that ask for the same name at the same moment get two folders.

    Raises:
        RunError: it cannot be made.
    """
    path = Path(path)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    chosen, number = path, 1
    try:
        while True:
            try:
                chosen.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                chosen = path.with_name(f"{path.name}-{number}")
    except OSError as error:
        reason = error.strerror
        raise RunError(f"cannot write to the run folder {chosen}: {reason}") from error
    try:
        yield chosen
    finally:
        if chosen.is_dir() and {file.name for file in chosen.iterdir()} <= {LOCK}:
            _remove_folders([chosen, *new_folders], chosen)


def _lock(path: Path) -> Callable[[], None]:
    """Lock the folder of a run; return what unlocks it."""
    unlock = lock_file(path / LOCK)
    if unlock is None:
        raise RunError(f"another process is training in {path}")
    return unlock


def _remove_folders(folders: list[Path], path: Path) -> None:
    """Take back the folders that a failed creation made, innermost first."""
    if path in folders:
        (path / LOCK).unlink(missing_ok=True)
    for folder in folders:
        # Another process may begin to use an outer one at any moment.
        with contextlib.suppress(OSError):
            folder.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file; a crash at any moment leaves the old content or the new, never a mix."""
    with replaced(path) as file:
        file.write(data)
