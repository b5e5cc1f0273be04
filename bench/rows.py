"""Rows of measurements in JSON lines: one file per machine, only ever appended to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path

from sparsekern._system import replaced
from sparsekern.benchmarks.measure import Row


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Append rows to `<folder>/<machine>.jsonl`: the whole new file is written beside and renamed,
    so that earlier rows survive whatever happens. Several processes may append at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = folder / f"{row['machine']}.jsonl"
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            earlier = path.read_bytes() if path.exists() else b""
            with replaced(path) as file:
                file.write(earlier + _line(row))
        finally:
            os.close(handle)


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def load(folder: Path) -> list[Row]:
    """All rows of all machines in a folder, oldest first."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
    return sorted(rows, key=lambda row: row["date"])
