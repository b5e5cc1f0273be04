"""Writing activations to HDF5, under a temporary name until everything is on the disk.

A run that is killed leaves no file of the final name; what it left under the temporary one,
``.<name>.new``, is overwritten by the next.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..._system import require
from ..errors import DataError
from ..hdf5_writing import NewFile, new_hdf5
from ..hdf5_writing import check_new as check_path
from .activation_file import ACTIVATIONS, DIRECTIONS
from .order import BLOCK_BYTES
from .rows import nonfinite_rows

STORED = (torch.float32, torch.float16, torch.bfloat16)
FUNCTION = "write_activations"
COLUMN_CHUNK = 65536  # rows

Item = TypeVar("Item")
Piece = tuple[Tensor | np.ndarray, Mapping[str, Tensor]]  # rows [n, D], columns [n] by name


def write_activations(
    path: str | Path,
    batches: Iterable[Tensor | np.ndarray],
    *,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    directions: Tensor | None = None,
    keep_partial: bool = False,
) -> int:
    """Write batches of activations to a new HDF5 file and return the number of rows.

    Args:
        path: the file, ``.h5`` or ``.hdf5``; it must not exist.
        batches: ``[rows, D]`` of floating dtype, any number of rows each, on any device. Taken one
            after the other, so that memory is needed for one of them and a chunk.
        dtype: stored: float32, float16 or bfloat16. By default bfloat16 for batches of that dtype,
            whose range float16 does not have, and float16 for all others.
        chunk_rows: rows that are stored and read together; by default those of 1 MiB.
        directions: ``[n, D]``, the true directions, where they are known.
        keep_partial: when an error ends the writing, keep the rows before it, in a file
            ``<name>.partial.h5`` that the error names.

    Raises:
        DataError: the file exists, is being written by another process, or its folder is missing;
            the disk is full; a batch has another shape than ``[rows, D]``; a finite value is too
            large for ``dtype``; there are no rows.
        ValueError: dtype, chunk_rows or the suffix are not possible.
    """
    pieces: Iterator[Piece] = ((batch, {}) for batch in batches)
    return write_pieces(
        path, pieces, dtype=dtype, default=_compact_dtype, chunk_rows=chunk_rows,
        directions=directions, keep_partial=keep_partial,
    )  # fmt: skip


def _compact_dtype(given: torch.dtype) -> torch.dtype:
    return given if given == torch.bfloat16 else torch.float16


def write_pieces(
    path: str | Path,
    pieces: Iterable[Piece],
    *,
    dtype: torch.dtype | None,
    default: Callable[[torch.dtype], torch.dtype],
    chunk_rows: int | None,
    directions: Tensor | None = None,
    keep_partial: bool = False,
) -> int:
    """Write batches as :func:`write_activations` does, with columns of integers beside them.

    Args:
        path: see :func:`write_activations`.
        pieces: batches ``[rows, D]``, and columns ``[rows]`` by name, the same for all.
        dtype: see :func:`write_activations`.
        default: what dtype to store where ``dtype`` is None, from that of the first batch.
        chunk_rows: see :func:`write_activations`.
        directions: see :func:`write_activations`.
        keep_partial: see :func:`write_activations`.

    Returns:
        The number of rows.

    Raises:
        DataError: as :func:`write_activations`.
        ValueError: as :func:`write_activations`.
    """
    path = Path(path)
    if dtype is not None and dtype not in STORED:
        raise ValueError(
            f"{FUNCTION}: dtype must be one of {', '.join(map(str, STORED))}, got {dtype}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{FUNCTION}: chunk_rows must be at least 1, got {chunk_rows}")
    check_new(path)
    failure: BaseException | None = None
    with new_hdf5(path, FUNCTION) as new:
        rows = _RowWriter(new, chunk_rows, directions)
        try:
            for batch, columns in _stored_batches(pieces, dtype, default):
                rows.add(batch, columns)
            if rows.count == 0:
                raise DataError(f"{FUNCTION}: there are no rows to write to {path}")
        except BaseException as error:
            if not keep_partial or rows.count == 0:
                raise
            failure, new.path = error, _partial_path(path)
        rows.finish()
        partial = new.path
    if failure is not None:
        note = f"the {rows.count} rows before are kept in {partial}"
        if isinstance(failure, DataError):
            raise DataError(f"{failure}; {note}") from failure
        # What add_note does, from Python 3.11 on.
        failure.__notes__ = [*getattr(failure, "__notes__", ()), note]
        raise failure
    return rows.count


def with_progress(
    pieces: Generator[Item], what: str, size: Callable[[Item], int], tokens: int | None = None
) -> Generator[Item]:
    """Show a progress bar in tokens while the pieces pass, where somebody watches; close them.

    Args:
        pieces: what passes.
        what: beside the bar, and what needs tqdm in the error without it.
        size: tokens of a piece.
        tokens: of all pieces, where that is known.
    """
    tqdm = require("tqdm", what).tqdm
    unit = {"unit": " tokens", "unit_scale": True}
    # disable=None: no bar where nobody watches.
    with closing(pieces), tqdm(total=tokens, desc=what, disable=None, **unit) as bar:
        for piece in pieces:
            yield piece
            bar.update(size(piece))


def check_new(path: str | Path) -> None:
    """Raise what :func:`write_activations` would, as far as the path alone tells."""
    path = Path(path)
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise ValueError(f"{FUNCTION}: path must end in .h5 or .hdf5, got {path}")
    check_path(path, FUNCTION)


def _partial_path(path: Path) -> Path:
    """Name a file beside this one that is not there yet, of the same kind."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.stem}.partial{n}{path.suffix}") for n in numbers)
    return next(name for name in names if not os.path.lexists(name))


def _stored_batches(
    pieces: Iterable[Piece],
    dtype: torch.dtype | None,
    default: Callable[[torch.dtype], torch.dtype],
) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """Convert the batches to CPU tensors [rows, D] of the stored dtype; leave out empty ones."""
    features, given_dtype, stored_dtype = None, None, dtype
    for number, (given, columns) in enumerate(pieces):
        batch = torch.as_tensor(given).detach()
        features = batch.shape[-1] if features is None and batch.dim() == 2 else features
        if batch.dim() != 2 or batch.shape[1] != features or features == 0:
            raise DataError(
                f"{FUNCTION}: batch {number} must be [rows, {features or 'D'}], got "
                f"{list(batch.shape)}"
            )
        if not batch.dtype.is_floating_point:
            raise DataError(f"{FUNCTION}: batch {number} must be floating, got {batch.dtype}")
        given_dtype = given_dtype or batch.dtype
        stored_dtype = stored_dtype or default(batch.dtype)
        if dtype is None and torch.promote_types(batch.dtype, given_dtype) != given_dtype:
            raise DataError(
                f"{FUNCTION}: batch {number} is {batch.dtype}, those before {given_dtype}: dtype "
                f"must say what to store"
            )
        stored = batch.to("cpu", stored_dtype)
        if stored.numel() == 0:
            continue
        if batch.dtype != stored_dtype and len(nonfinite_rows(stored)):
            _check_range(number, batch.cpu(), stored)
        yield stored, columns


def _check_range(number: int, batch: Tensor, stored: Tensor) -> None:
    lost = batch.isfinite() & ~stored.isfinite()
    if lost.any():
        wider = [kind for kind in STORED if batch[lost].to(kind).isfinite().all()]
        remedy = " or ".join(f"dtype={kind}" for kind in wider) or "scale them down"
        raise DataError(
            f"{FUNCTION}: batch {number} holds {batch[lost][0].item():g}, which is too large for "
            f"{stored.dtype} (use {remedy}; bfloat16 has the range of float32)"
        )


class _RowWriter:
    """The datasets of a file: pieces of whole chunks are written, the rest waits."""

    def __init__(self, new: NewFile, chunk_rows: int | None, directions: Tensor | None) -> None:
        self._new, self._chunk_rows, self._directions = new, chunk_rows, directions
        self._rows: Any = None
        self._columns: dict[str, Any] = {}
        self._waiting: list[Tensor] = []
        self._written = 0

    @property
    def count(self) -> int:
        """Rows that are written or wait."""
        return self._written + sum(map(len, self._waiting))

    def add(self, batch: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Take a batch [rows, D] and its columns [rows]."""
        row_bytes = batch.shape[1] * batch.element_size()
        if self._rows is None and not self._waiting:
            self._check_directions(batch.shape[1])
            self._chunk_rows = self._chunk_rows or max(1, BLOCK_BYTES // row_bytes)
        chunk_rows = self._chunk_rows or 1
        self._add_columns(batch, columns)
        if not self._waiting:
            # What waits is written in any case.
            self._new.reserve(chunk_rows * row_bytes)
        if self.count - self._written + len(batch) < chunk_rows:
            # A copy: the batch may be the caller's, who may fill it anew.
            self._waiting.append(batch.clone())
            return
        rows = torch.cat([*self._waiting, batch]) if self._waiting else batch
        self._waiting = []
        complete_rows = len(rows) - len(rows) % chunk_rows
        step = chunk_rows * max(1, BLOCK_BYTES // (chunk_rows * row_bytes))
        for start in range(0, complete_rows, step):
            self._new.reserve((step + chunk_rows) * row_bytes)
            self._write(rows[start : min(start + step, complete_rows)])
        if complete_rows < len(rows):
            self._waiting = [rows[complete_rows:].clone()]

    def finish(self) -> None:
        """Write what waits."""
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            self._write(rows)
        for column in self._columns.values():
            column.resize(self._written, axis=0)
        if self._directions is not None:
            directions = self._directions.detach().to("cpu", torch.float32).numpy()
            self._new.reserve(directions.nbytes)
            self._new.file[DIRECTIONS] = directions

    def _write(self, batch: Tensor) -> None:
        values = (batch.view(torch.uint16) if batch.dtype == torch.bfloat16 else batch).numpy()
        with self._new.writing():
            if self._rows is None:
                # The first piece has fewer rows than a chunk only if it is all there is.
                self._rows = self._new.file.create_dataset(
                    ACTIVATIONS,
                    shape=(0, values.shape[1]),
                    maxshape=(None, values.shape[1]),
                    chunks=(min(self._chunk_rows or 1, len(values)), values.shape[1]),
                    dtype=values.dtype,
                )
                self._rows.attrs["dtype"] = str(batch.dtype).removeprefix("torch.")
            self._rows.resize(self._written + len(values), axis=0)
            self._rows[self._written :] = values
        self._written += len(values)

    def _add_columns(self, batch: Tensor, columns: Mapping[str, Tensor]) -> None:
        if columns:
            self._new.reserve(sum(column.nbytes for column in columns.values()))
        for name, given in columns.items():
            values = given.cpu().numpy()
            if name not in self._columns:
                self._columns[name] = self._new.file.create_dataset(
                    name, shape=(0,), maxshape=(None,), chunks=(COLUMN_CHUNK,), dtype=values.dtype
                )
            self._columns[name].resize(self.count + len(values), axis=0)
            self._columns[name][self.count :] = values

    def _check_directions(self, features: int) -> None:
        directions = self._directions
        if directions is not None and (directions.dim() != 2 or directions.shape[1] != features):
            raise DataError(
                f"{FUNCTION}: directions must be [n, {features}], got {list(directions.shape)}"
            )
