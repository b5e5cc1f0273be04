"""Rows of activations that are not to be used: not finite, or longer than allowed."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..._system import require
from ..errors import DataError
from .activation_file import ActivationFile
from .order import block_rows

SCAN_ROWS = 65536
# Elements squared at a time in float64, so that they stay in a core's cache.
NORM_ELEMENTS = 1 << 16
POSITIONS_NAMED = 5
NO_ROWS = np.empty(0, np.int64)
HELD_OUT_PIECES = 16
# Bits of the sign removed; the exponent of infinities and NaN, the largest there is.
_FLOAT_BITS = {
    torch.float32: (torch.int32, np.int32(0x7FFFFFFF), 0x7F800000),
    torch.float16: (torch.int16, np.int16(0x7FFF), 0x7C00),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), 0x7F80),
}


def nonfinite_rows(rows: Tensor) -> Tensor:
    """Find the rows of ``[n, D]`` that hold NaN or infinities: their numbers, int64 ``[m]``."""
    integer, magnitude, exponent = _FLOAT_BITS[rows.dtype]
    # On integers: two plain passes, where isfinite takes several in half precision.
    bits = rows.contiguous().view(integer).numpy() & magnitude
    if bits.size == 0 or bits.max() < exponent:
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.flatnonzero(bits.max(1) >= exponent))


def held_out_blocks(lengths: list[int], rows: int) -> list[list[int]]:
    """Choose the rows to hold out of files of these lengths: spread evenly over them all.

    They are the ends of up to 16 equal parts of all files together, as [number of the file, first
    row, row after the last].

    Args:
        lengths: rows of each file.
        rows: how many to hold out.
    """
    total, pieces = sum(lengths), min(HELD_OUT_PIECES, rows)
    firsts = np.cumsum([0, *lengths])
    blocks = []
    for piece in range(pieces):
        stop = (piece + 1) * total // pieces
        start = stop - ((piece + 1) * rows // pieces - piece * rows // pieces)
        for number, (first, last) in enumerate(itertools.pairwise(firsts)):
            if start < last and stop > first:
                blocks.append([number, max(start, first) - first, min(stop, last) - first])
    return [[int(value) for value in block] for block in blocks]


def row_norms(rows: Tensor) -> np.ndarray:
    """Compute the L2 norms, float64 ``[n]``, of rows ``[n, D]`` on the CPU.

    Summed in float64 in an order that depends on nothing but D, so that a row is as long in every
    run, on any number of threads.
    """
    norms = np.empty(len(rows))
    step = max(1, NORM_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].double().numpy()
        norms[start : start + step] = np.sqrt(np.einsum("nd,nd->n", piece, piece))
    return norms


def find_unusable_rows(
    file: ActivationFile, nonfinite: str, max_norm: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole file for the rows to leave out, int64, ascending.

    Args:
        file: which it is.
        nonfinite: ``"refuse"`` or ``"skip"`` rows with NaN or infinities.
        max_norm: longer rows are left out; None for no limit.

    Returns:
        Those that are not finite, and the finite ones whose norm exceeds ``max_norm``.

    Raises:
        DataError: a row is not finite and ``nonfinite`` is ``"refuse"``; the file is damaged.
    """
    tqdm = require("tqdm", "looking for rows to leave out").tqdm
    step = block_rows(file, SCAN_ROWS)
    buffer = torch.empty(step, file.features, dtype=file.dtype)
    all_nonfinite, all_longer = [NO_ROWS], [NO_ROWS]
    # disable=None: no bar where nobody watches.
    for start in tqdm(range(0, file.tokens, step), f"checking {file.path.name}", disable=None):
        rows = buffer[: min(step, file.tokens - start)]
        file.read(start, rows)
        nonfinite_here = nonfinite_rows(rows).numpy()
        if len(nonfinite_here) and nonfinite == "refuse":
            raise nonfinite_error(
                [(file, start + row) for row in nonfinite_here.tolist()], len(rows)
            )
        all_nonfinite.append(start + nonfinite_here)
        if max_norm is not None:
            # NaN compares as not longer; infinities are found already.
            longer = np.flatnonzero(row_norms(rows) > max_norm)
            all_longer.append(start + np.setdiff1d(longer, nonfinite_here, assume_unique=True))
    return np.concatenate(all_nonfinite), np.concatenate(all_longer)


def nonfinite_error(bad: list[tuple[ActivationFile, int]], read: int) -> DataError:
    """Make the error that names rows which hold NaN or infinities.

    Args:
        bad: files and numbers of such rows.
        read: rows that were read together.
    """
    named = ", ".join(f"row {row} of {file.path}" for file, row in bad[:POSITIONS_NAMED])
    return DataError(
        f"activations are not finite: {len(bad)} of {read} rows read together hold NaN or "
        f"infinities: {named}{', ...' if len(bad) > POSITIONS_NAMED else ''} "
        f"(nonfinite='skip' leaves such rows out)"
    )


def drop_rows(rows: Tensor, start: int, left_out: np.ndarray) -> Tensor:
    """Move the rows that stay to the front; ``rows`` are those from number ``start`` on.

    Args:
        rows: ``[n, D]``, overwritten.
        start: number of the first of them.
        left_out: numbers of the rows to leave out, int64, ascending.

    Returns:
        The front of ``rows``, ``[m, D]``.
    """
    first, last = np.searchsorted(left_out, [start, start + len(rows)])
    if first == last:
        return rows
    stays = torch.ones(len(rows), dtype=torch.bool)
    stays[torch.from_numpy(left_out[first:last] - start)] = False
    remaining = rows[stays]
    rows[: len(remaining)] = remaining
    return rows[: len(remaining)]
