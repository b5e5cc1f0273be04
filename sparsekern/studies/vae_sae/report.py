"""The report of a reproduction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .grid import Cell


def write(
    folder: Path,
    asked: Mapping[str, Any],
    found: Mapping[Cell, Mapping[str, Any]],
    *,
    failed: Mapping[str, str],
    total: int,
) -> None:
    """Writes report.md and report.html."""
    (folder / "report.md").write_text(f"{len(found)} of {total} cells\n")
