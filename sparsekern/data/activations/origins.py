"""Where stored rows come from: sequence, position, token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .format import DOCUMENTS, POSITIONS, TOKEN_IDS, ActivationFile


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
    """Origins of the rows from ``start`` to ``stop``, numbered without those left out, in the order
    of the files; None where a file does not say."""
    found: dict[str, list[np.ndarray]] = {}
    at = after = 0
    for file, out in zip(files, left_out, strict=True):
        here = file.tokens - len(out)
        if start < at + here and at < stop:
            first, last = max(start - at, 0), min(stop - at, here)
            row, end = _place(out, first), _place(out, last - 1) + 1
            gone = out[(out >= row) & (out < end)] - row
            for name in (DOCUMENTS, POSITIONS, TOKEN_IDS):
                column = file.origins(name, row, end)
                if column is not None:
                    offset = after if name == DOCUMENTS else 0
                    found.setdefault(name, []).append(np.delete(column, gone) + offset)
        at += here
        after += file.documents
    columns = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}
    rows = max(0, min(stop, at) - max(start, 0))
    if any(len(columns.get(name, ())) != rows for name in (DOCUMENTS, POSITIONS)) or not columns:
        return None
    tokens = columns.get(TOKEN_IDS)
    complete = tokens is not None and len(tokens) == rows
    return Origins(columns[DOCUMENTS], columns[POSITIONS], tokens if complete else None)


def origin_columns(files: Sequence[ActivationFile]) -> list[str]:
    """The columns that all files hold; none without documents and positions."""
    known = [
        name
        for name in (DOCUMENTS, POSITIONS, TOKEN_IDS)
        if all(file.origins(name, 0, 1) is not None for file in files)
    ]
    return known if known[:2] == [DOCUMENTS, POSITIONS] else []


def _place(left_out: np.ndarray, number: int) -> int:
    """The row of a file that has this number when those left out (ascending) are not counted."""
    before = np.searchsorted(left_out - np.arange(len(left_out)), number, side="right")
    return number + int(before)
