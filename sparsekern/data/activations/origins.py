"""Where stored rows come from: sequence, position, token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .activation_file import DOCUMENTS, POSITIONS, TOKEN_IDS, ActivationFile


class Origins(NamedTuple):
    """Where rows come from; all int64 ``[rows]``.

    ``documents`` numbers the sequences as they were captured, those of later files after those of
    earlier ones; ``positions`` counts the real tokens of a sequence from 0; ``token_ids`` is None
    where the files do not hold them.
    """

    documents: Tensor
    positions: Tensor
    token_ids: Tensor | None


def origins_of(
    files: Sequence[ActivationFile], left_out: Sequence[np.ndarray], start: int, stop: int
) -> Origins | None:
    """Read the origins of rows ``start`` to ``stop``; None where a file does not hold them.

    The rows are numbered in the order of the files, without those left out.

    Args:
        files: in their order.
        left_out: for each file the rows that do not count, int64, ascending.
        start: the first row.
        stop: the row after the last.
    """
    parts: dict[str, list[np.ndarray]] = {}
    first_here = documents_before = 0
    for file, left in zip(files, left_out, strict=True):
        rows_here = file.tokens - len(left)
        if start < first_here + rows_here and first_here < stop:
            first, last = max(start - first_here, 0), min(stop - first_here, rows_here)
            row, end = _place(left, first), _place(left, last - 1) + 1
            skipped = left[(left >= row) & (left < end)] - row
            for name in (DOCUMENTS, POSITIONS, TOKEN_IDS):
                column = file.origins(name, row, end)
                if column is not None:
                    offset = documents_before if name == DOCUMENTS else 0
                    parts.setdefault(name, []).append(np.delete(column, skipped) + offset)
        first_here += rows_here
        documents_before += file.documents
    columns = {name: torch.from_numpy(np.concatenate(pieces)) for name, pieces in parts.items()}
    rows = max(0, min(stop, first_here) - max(start, 0))
    if any(len(columns.get(name, ())) != rows for name in (DOCUMENTS, POSITIONS)) or not columns:
        return None
    tokens = columns.get(TOKEN_IDS)
    complete = tokens is not None and len(tokens) == rows
    return Origins(columns[DOCUMENTS], columns[POSITIONS], tokens if complete else None)


def origin_columns(files: Sequence[ActivationFile]) -> list[str]:
    """List the columns that all files hold; none without documents and positions."""
    columns = [
        name
        for name in (DOCUMENTS, POSITIONS, TOKEN_IDS)
        if all(file.origins(name, 0, 1) is not None for file in files)
    ]
    return columns if columns[:2] == [DOCUMENTS, POSITIONS] else []


def _place(left_out: np.ndarray, number: int) -> int:
    """Find the row of a file with this number when those left out (ascending) are not counted."""
    before = np.searchsorted(left_out - np.arange(len(left_out)), number, side="right")
    return number + int(before)
