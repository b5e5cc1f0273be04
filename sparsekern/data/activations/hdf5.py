"""Activations in HDF5.

Where whole rows lie in the file as they are read, the system reads them; h5py would keep all other
Python threads waiting meanwhile. All that this takes for granted is checked first: the stored
type's bits, filters, layout, the file that the dataset lives in, and where each chunk lies.
Everything else is read, and converted, by h5py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._system import require
from ..errors import DataError
from ..hdf5 import check_stored, descriptor_of, one_line, open_hdf5
from ..npy import read_bytes
from .activation_file import DIRECTIONS, FROM_NUMPY, LISTED, ActivationFile


class Hdf5File(ActivationFile):
    """A dataset ``[tokens, D]``; see :func:`~.opening.open_activations`."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        # Without a chunk cache: whole chunks go straight from the file into the buffer.
        self._file = open_hdf5(path, "activation file", rdcc_nbytes=0)
        # Of each chunk that was ever written: its first row, ascending, and its place.
        self._chunks = np.empty(0, np.int64), np.empty(0, np.int64)
        try:
            with self._refusing_damage():
                self._rows = self._open_dataset(name)
                self._descriptor = descriptor_of(self._rows)
                self.stamp = self._stamp()
                check_stored(
                    self._rows, path, f"activation file is truncated or damaged: {path}: {name}"
                )
                self._raw = self._lies_as_read()
                self._check_chunks()
        except BaseException:
            self._file.close()
            raise

    def _stat(self) -> os.stat_result:
        return os.stat(self.path) if self._descriptor is None else os.fstat(self._descriptor)

    def _lies_as_read(self) -> bool:
        """Tell whether whole rows lie in the file as they are read."""
        h5py = require("h5py", f"reading {self.path}")
        rows, properties = self._rows, self._rows.id.get_create_plist()
        kind = np.dtype("uint16" if self.dtype == torch.bfloat16 else rows.dtype.name)
        if (
            self._descriptor is None
            # Sizes, byte order, and where in them sign, exponent and fraction lie.
            or rows.id.get_type() != h5py.h5t.py_create(kind)
            or properties.get_nfilters()
            or properties.get_external_count()
            # HDF5 counts from its end.
            or rows.file.userblock_size
        ):
            return False
        if properties.get_layout() == h5py.h5d.CONTIGUOUS:
            offset = rows.id.get_offset()
            if offset is None:
                return False
            self._check_end(offset, self.tokens * self._row_bytes())
            return True
        return bool(
            properties.get_layout() == h5py.h5d.CHUNKED
            and rows.chunks[1] == self.features
            and hasattr(rows.id, "chunk_iter")
        )

    def _row_bytes(self) -> int:
        return self.features * self.dtype.itemsize

    def _check_end(self, offset: int, size: int) -> None:
        """Raise EOFError where the file ends before so many bytes from the offset on."""
        if offset + size > self.stamp[0]:
            raise EOFError(f"the file ends before byte {offset + size}")

    def _check_chunks(self) -> None:
        """Check where all chunks lie, once: HDF5 walks through them all to find one, too.

        A damaged table gives fill values, rows of other chunks, or kills the process.
        """
        if self._rows.chunks is None or not hasattr(self._rows.id, "chunk_iter"):
            return
        chunks: list[tuple[int, ...]] = []
        self._rows.id.chunk_iter(
            lambda chunk: chunks.append((*chunk.chunk_offset, chunk.byte_offset, chunk.size))
        )
        table = np.array(sorted(chunks), np.int64).reshape(-1, 4)
        corners, places, sizes = table[:, :2], table[:, 2], table[:, 3]
        in_file = np.argsort(places, kind="stable")
        ends = places[in_file] + sizes[in_file]
        if len(table) and not (
            (corners % self._rows.chunks == 0).all()
            and ((corners >= 0) & (corners < self._rows.shape)).all()
            and np.diff(corners, axis=0).any(1).all()
            and (places >= 0).all()
            and (sizes > 0).all()
            and (ends[:-1] <= places[in_file][1:]).all()
            and ends[-1] <= self.stamp[0]
        ):
            raise ValueError("its chunks do not lie beside each other in the file")
        if self._raw and (sizes != self._rows.chunks[0] * self._row_bytes()).any():
            raise ValueError("its chunks have other sizes than their rows")
        self._chunks = np.ascontiguousarray(corners[:, 0]), np.ascontiguousarray(places)

    def _locate(self, row: int, stop: int) -> tuple[int | None, int]:
        """Find the byte at which a row lies, and the end of the rows that follow it there.

        None for the byte where nothing was ever written.
        """
        if self._rows.chunks is None:
            return self._rows.id.get_offset() + row * self._row_bytes(), stop
        first_rows, places = self._chunks
        first = row - row % self._rows.chunks[0]
        end = min(stop, first + self._rows.chunks[0])
        number = int(np.searchsorted(first_rows, first))
        if number == len(first_rows) or first_rows[number] != first:
            return None, end
        return int(places[number]) + (row - first) * self._row_bytes(), end

    def _open_dataset(self, name: str) -> Any:
        h5py = require("h5py", f"reading {self.path}")
        rows = self._file.get(name)
        if not isinstance(rows, h5py.Dataset):
            raise DataError(self._describe_missing(name, h5py))
        if rows.file.mode != "r":
            raise DataError(
                f"activation file is locked by a writer: {self.path}: {name} lies in "
                f"{rows.file.filename}, which is open for writing in this process"
            )
        native = rows.dtype.newbyteorder("=")
        dtype = FROM_NUMPY.get(native.name)
        if native == np.uint16 and _is_bfloat16(rows):
            dtype = torch.bfloat16
        self._set_layout(name, rows.shape or (), dtype, str(rows.dtype))
        self.chunk_rows = min(rows.chunks[0], self.tokens) if rows.chunks else 1
        return rows

    def _describe_missing(self, name: str, h5py: Any) -> str:
        where = f"activation file has another layout: {self.path}"
        link = self._file.get(name, getlink=True) if self._file.get(name) is None else None
        if isinstance(link, h5py.ExternalLink):
            return f"{where}: {name} leads to {link.path} in {link.filename}, which is missing"
        datasets: list[str] = []
        self._file.visititems(
            lambda key, item: (
                datasets.append(one_line(f"{key} {item.dtype} {list(item.shape or ())}"))
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
        listed = ", ".join(datasets[:LISTED]) or "no dataset"
        more = ", ..." if len(datasets) > LISTED else ""
        return f"{where} has no dataset {name!r}; it holds {listed}{more}"

    def _read(self, start: int, target: np.ndarray) -> None:
        row, stop = start, start + len(target)
        while row < stop:
            offset, end = self._locate(row, stop) if self._raw else (None, stop)
            part = target[row - start : end - start]
            if offset is None or self._descriptor is None:
                self._rows.read_direct(part, np.s_[row:end])
            else:
                read_bytes(self._descriptor, offset, part)
            row = end

    def directions(self) -> Tensor | None:
        """Read the true directions, float32 ``[n, D]``; None if the file holds none.

        Raises as :meth:`read`, and where they have another layout.
        """
        with self._refusing_damage(DIRECTIONS):
            field = self._file.get(DIRECTIONS)
            if field is None:
                return None
            self._check_directions(getattr(field, "shape", None) or ())
            self._check_field(DIRECTIONS, field)
            if field.dtype.newbyteorder("=") == np.uint16 and _is_bfloat16(field):
                bits = torch.from_numpy(field[:].astype(np.uint16))
                return bits.view(torch.bfloat16).float()
            if field.dtype.kind != "f":
                raise DataError(
                    f"activation file has another layout: {self.path}: {DIRECTIONS} must be "
                    f"floating, got {field.dtype}"
                )
            return torch.from_numpy(field[:]).float()

    def origins(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Read rows ``start`` to ``stop`` of a column of origins, int64; None if there is none.

        Raises as :meth:`read`, and where the column has another layout.
        """
        with self._refusing_damage(name):
            field = self._file.get(name)
            if field is None:
                return None
            shape, kind = getattr(field, "shape", None), getattr(field, "dtype", np.dtype("O"))
            if shape != (self.tokens,) or kind.kind not in "iu":
                raise DataError(
                    f"activation file has another layout: {self.path}: {name} must be integers "
                    f"[{self.tokens}], got {kind} {list(shape or ())}"
                )
            self._check_field(name, field)
            column: np.ndarray = field[start:stop].astype(np.int64)
            self._check_unchanged()
            return column

    def _check_field(self, name: str, field: Any) -> None:
        check_stored(
            field, self.path, f"activation file is truncated or damaged: {self.path}: {name}"
        )

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _is_bfloat16(dataset: Any) -> bool:
    """Tell whether the attribute ``dtype`` says bfloat16, however its writer stores strings."""
    value = dataset.attrs.get("dtype")
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    return value in ("bfloat16", b"bfloat16") if isinstance(value, (str, bytes)) else False
