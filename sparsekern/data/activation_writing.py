"""Writing activations to HDF5, under a temporary name until everything is on the disk.

A run that is killed leaves no file of the final name; what it left under the temporary one,
``.<name>.new``, is overwritten by the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._system import require, sync
from .activation_format import ACTIVATIONS, DIRECTIONS
from .activation_order import BLOCK_BYTES
from .activation_rows import nonfinite_rows
from .factors import DataError

STORED = (torch.float32, torch.float16, torch.bfloat16)


def write_activations(
    path: str | Path,
    batches: Iterable[Tensor | np.ndarray],
    *,
    dtype: torch.dtype = torch.float16,
    chunk_rows: int | None = None,
    directions: Tensor | None = None,
) -> int:
    """Writes batches of activations to a new HDF5 file and returns the number of rows.

    Args:
        path: the file, ``.h5`` or ``.hdf5``; it must not exist.
        batches: ``[rows, D]`` of floating dtype, any number of rows each, on any device. Taken one
            after the other, so that memory is needed for one of them and a chunk.
        dtype: stored: float32, float16 or bfloat16.
        chunk_rows: rows that are stored and read together; by default those of 1 MiB.
        directions: ``[n, D]``, the true directions, where they are known.

    Raises:
        DataError: the file exists, is being written by another process, or its folder is missing;
            a batch has another shape than ``[rows, D]``; a finite value is too large for
            ``dtype``; there are no rows.
        ValueError: dtype, chunk_rows or the suffix are not possible.
    """
    path = Path(path)
    if dtype not in STORED:
        raise ValueError(
            f"write_activations: dtype must be one of {', '.join(map(str, STORED))}, got {dtype}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"write_activations: chunk_rows must be at least 1, got {chunk_rows}")
    check_new(path)
    with _new_hdf5(path) as file:
        tokens, rows = 0, None
        for batch in _whole_chunks(_checked(batches, dtype), chunk_rows):
            if rows is None:
                rows = _dataset(file, batch, chunk_rows)
                _write_directions(file, directions, batch.shape[1])
            rows.resize(tokens + len(batch), axis=0)
            rows[tokens:] = _storable(batch)
            tokens += len(batch)
        if rows is None:
            raise DataError(f"write_activations: there are no rows to write to {path}")
    return tokens


def check_new(path: str | Path) -> None:
    """Raises what :func:`write_activations` would, as far as the path alone tells."""
    path = Path(path)
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise ValueError(f"write_activations: path must end in .h5 or .hdf5, got {path}")
    if path.exists():
        raise DataError(f"write_activations: {path} exists already (remove it or name another)")
    if not path.parent.is_dir():
        raise DataError(f"write_activations: folder not found: {path.parent}")


@contextmanager
def _new_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file that gets its name when the block ends, and is removed when it raises."""
    h5py = require("h5py", f"writing {path}")
    temporary = path.with_name(f".{path.name}.new")
    try:
        file = h5py.File(temporary, "w")
    except BlockingIOError as error:
        raise DataError(f"write_activations: another process is writing {path}") from error
    try:
        with file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _checked(batches: Iterable[Tensor | np.ndarray], dtype: torch.dtype) -> Iterator[Tensor]:
    """The batches as CPU tensors [rows, D] of the stored dtype, those without rows left out."""
    features = None
    for number, given in enumerate(batches):
        batch = torch.as_tensor(given).detach()
        features = batch.shape[-1] if features is None and batch.dim() == 2 else features
        if batch.dim() != 2 or batch.shape[1] != features or features == 0:
            raise DataError(
                f"write_activations: batch {number} must be [rows, {features or 'D'}], got "
                f"{list(batch.shape)}"
            )
        if not batch.dtype.is_floating_point:
            raise DataError(
                f"write_activations: batch {number} must be floating, got {batch.dtype}"
            )
        stored = batch.to("cpu", dtype)
        if stored.numel() == 0:
            continue
        if batch.dtype != dtype and len(nonfinite_rows(stored)):
            lost = batch.cpu().isfinite() & ~stored.isfinite()
            if lost.any():
                raise DataError(
                    f"write_activations: batch {number} holds {batch.cpu()[lost][0].item():g}, "
                    f"which is too large for {dtype} (bfloat16 has the range of float32)"
                )
        yield stored


def _default_chunk(batch: Tensor) -> int:
    return max(1, BLOCK_BYTES // (batch.shape[1] * batch.element_size()))


def _whole_chunks(batches: Iterator[Tensor], chunk_rows: int | None) -> Iterator[Tensor]:
    """The same rows in pieces of whole chunks, but for the last: no chunk is written twice."""
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        chunk_rows = chunk_rows or _default_chunk(batch)
        waiting.append(batch)
        count += len(batch)
        if count >= chunk_rows:
            rows = torch.cat(waiting) if len(waiting) > 1 else batch
            count = len(rows) % chunk_rows
            yield rows[: len(rows) - count]
            # A copy: the batch may be the caller's, who may fill it anew.
            waiting = [rows[len(rows) - count :].clone()] if count else []
        else:
            waiting[-1] = batch.clone()
    if count:
        yield torch.cat(waiting)


def _dataset(file: Any, batch: Tensor, chunk_rows: int | None) -> Any:
    values = _storable(batch)
    # The first piece has fewer rows than a chunk only if it is all there is.
    chunk_rows = min(chunk_rows or _default_chunk(batch), len(batch))
    rows = file.create_dataset(
        ACTIVATIONS,
        shape=(0, batch.shape[1]),
        maxshape=(None, batch.shape[1]),
        chunks=(chunk_rows, batch.shape[1]),
        dtype=values.dtype,
    )
    rows.attrs["dtype"] = str(batch.dtype).removeprefix("torch.")
    return rows


def _write_directions(file: Any, directions: Tensor | None, features: int) -> None:
    if directions is None:
        return
    if directions.dim() != 2 or directions.shape[1] != features:
        raise DataError(
            f"write_activations: directions must be [n, {features}], got {list(directions.shape)}"
        )
    file[DIRECTIONS] = directions.detach().to("cpu", torch.float32).numpy()


def _storable(batch: Tensor) -> np.ndarray:
    return (batch.view(torch.uint16) if batch.dtype == torch.bfloat16 else batch).numpy()
