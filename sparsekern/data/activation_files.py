"""One file of activations ``[tokens, D]``: opened, checked, and read in ranges of rows.

======================  ==================================================================
``.h5``, ``.hdf5``      a dataset, chunked or not, of float32, float16, or bfloat16 kept as
                        uint16 with the attribute ``dtype = "bfloat16"`` (HDF5 has no such type)
``.npy``                float32 or float16 in row-major order, memory-mapped
``.safetensors``        F32, F16 or BF16, memory-mapped
======================  ==================================================================

HDF5 and safetensors files may hold a second field ``directions`` ``[n, D]``: the true directions
that the activations are mixtures of.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._system import require
from .factors import DataError

ACTIVATIONS = "activations"
DIRECTIONS = "directions"
SUFFIXES = (".h5", ".hdf5", ".npy", ".safetensors")
LISTED = 10

_FROM_NUMPY = {"float32": torch.float32, "float16": torch.float16}
_FROM_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ActivationFile:
    """An open file of activations.

    Attributes:
        path: the file.
        tokens: rows.
        features: D.
        dtype: float32, float16 or bfloat16, as stored.
        chunk_rows: rows that the file stores together; 1 where any range costs the same.
    """

    path: Path
    tokens: int
    features: int
    dtype: torch.dtype
    chunk_rows: int = 1

    def read(self, start: int, out: Tensor) -> None:
        """Fills ``out`` ``[rows, D]``, of the file's dtype and on the CPU, from row ``start`` on.

        Raises:
            DataError: the file is damaged there.
        """
        raise NotImplementedError

    def directions(self) -> Tensor | None:
        """The true directions, float32 ``[n, D]``, if the file holds them."""
        return None

    def close(self) -> None:
        """Releases the file."""

    def _check(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, got: str
    ) -> None:
        """Sets the attributes after checking what the file says about itself."""
        where = f"activation file has another layout: {self.path}: {name}"
        if len(shape) != 2:
            raise DataError(f"{where} must be [tokens, D], got {list(shape)}")
        if dtype is None:
            raise DataError(
                f"{where} must be float32, float16 or bfloat16 (in HDF5 as uint16 with the "
                f"attribute dtype='bfloat16'), got {got}"
            )
        if 0 in shape:
            raise DataError(f"activation file is empty: {self.path}: {name} is {list(shape)}")
        (self.tokens, self.features), self.dtype = shape, dtype

    def _check_directions(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[1] != self.features:
            raise DataError(
                f"activation file has another layout: {self.path}: {DIRECTIONS} must be "
                f"[n, {self.features}], got {list(shape)}"
            )


def open_activations(path: str | Path, dataset: str = ACTIVATIONS) -> ActivationFile:
    """Opens a file of activations by its suffix.

    Args:
        path: ``.h5``, ``.hdf5``, ``.npy`` or ``.safetensors``.
        dataset: name of the dataset (HDF5) or tensor (safetensors).

    Raises:
        DataError: it is missing, of another kind, damaged, locked by a writer, laid out
            otherwise, or empty. The message names the file.
        ModuleNotFoundError: h5py or safetensors is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"activation file not found: {path}")
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        return _Hdf5File(path, dataset)
    if suffix == ".npy":
        return _NpyFile(path)
    if suffix == ".safetensors":
        return _SafetensorsFile(path, dataset)
    raise DataError(
        f"activation file of unknown kind: {path} (its name must end in {', '.join(SUFFIXES)})"
    )


class _Hdf5File(ActivationFile):
    def __init__(self, path: Path, name: str) -> None:
        h5py = require("h5py", f"reading {path}")
        self.path = path
        try:
            # Without a chunk cache: whole chunks go straight from the file into the buffer.
            self._file = h5py.File(path, "r", rdcc_nbytes=0)
        except OSError as error:
            raise DataError(_opening_failed(path, error)) from error
        self._raw: int | None = None
        try:
            if self._file.mode != "r":  # HDF5 shares it with a writer in this process
                raise DataError(_locked(path, "it is open for writing in this process"))
            self._rows = self._dataset(name, h5py)
            if self._is_plain():
                self._raw = os.open(path, os.O_RDONLY)
        except BaseException:
            self._file.close()
            raise

    def _is_plain(self) -> bool:
        """Whether whole rows lie in the file as they are read, so that HDF5 need not read them."""
        rows = self._rows
        if rows.chunks is None:
            placed = rows.id.get_offset() is not None
        else:
            placed = rows.chunks[1] == self.features
        unchanged = rows.dtype.isnative and rows.id.get_create_plist().get_nfilters() == 0
        return hasattr(os, "preadv") and placed and unchanged and self._file.userblock_size == 0

    def _place(self, row: int, stop: int) -> tuple[int | None, int]:
        """The byte at which a row lies, and the end of the rows that follow it there.

        None for the byte where nothing was ever written.
        """
        row_bytes = self.features * self.dtype.itemsize
        if self._rows.chunks is None:
            return self._rows.id.get_offset() + row * row_bytes, stop
        first = row - row % self._rows.chunks[0]
        offset = self._rows.id.get_chunk_info_by_coord((first, 0)).byte_offset
        end = min(stop, first + self._rows.chunks[0])
        return None if offset is None else offset + (row - first) * row_bytes, end

    def _dataset(self, name: str, h5py: ModuleType) -> Any:
        rows = self._file.get(name)
        if not isinstance(rows, h5py.Dataset):
            there: list[str] = []
            self._file.visititems(
                lambda key, item: (
                    there.append(f"{key} {item.dtype} {list(item.shape or ())}")
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
            listed = ", ".join(there[:LISTED]) or "no dataset"
            raise DataError(
                f"activation file has another layout: {self.path} has no dataset {name!r}; it "
                f"holds {listed}{', ...' if len(there) > LISTED else ''}"
            )
        dtype = _FROM_NUMPY.get(rows.dtype.newbyteorder("=").name)
        if rows.dtype == np.uint16 and rows.attrs.get("dtype") == "bfloat16":
            dtype = torch.bfloat16
        self._check(name, rows.shape or (), dtype, str(rows.dtype))
        self.chunk_rows = min(rows.chunks[0], self.tokens) if rows.chunks else 1
        return rows

    def read(self, start: int, out: Tensor) -> None:
        target = (out.view(torch.uint16) if self.dtype == torch.bfloat16 else out).numpy()
        row, stop = start, start + len(out)
        try:
            while row < stop:
                # h5py keeps all other Python threads waiting while it reads, the system does not.
                offset, end = self._place(row, stop) if self._raw is not None else (None, stop)
                if self._raw is None or offset is None:
                    self._rows.read_direct(target[row - start : end - start], np.s_[row:end])
                else:
                    _read_bytes(self._raw, offset, target[row - start : end - start])
                row = end
        except (OSError, EOFError) as error:
            raise DataError(
                f"activation file is truncated or damaged: {self.path}: rows {start}..{stop - 1} "
                f"cannot be read ({error})"
            ) from error

    def directions(self) -> Tensor | None:
        field = self._file.get(DIRECTIONS)
        if field is None:
            return None
        self._check_directions(field.shape or ())
        return torch.from_numpy(field[:].astype(np.float32))

    def close(self) -> None:
        self._file.close()
        if self._raw is not None:
            os.close(self._raw)
            self._raw = None


def _read_bytes(descriptor: int, offset: int, target: np.ndarray) -> None:
    left = target.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}")
        left, offset = left[count:], offset + count


def _opening_failed(path: Path, error: OSError) -> str:
    """What went wrong, from HDF5's words: it has no error codes for these."""
    text = str(error)
    if isinstance(error, BlockingIOError) or "lock file" in text or "open for write" in text:
        return _locked(path, text)
    if "signature not found" in text:
        return f"activation file is not HDF5: {path}"
    return f"activation file is truncated or damaged: {path} ({text})"


def _locked(path: Path, reason: str) -> str:
    return (
        f"activation file is locked by a writer: {path} (wait until it has finished and closed "
        f"the file: {reason})"
    )


class _NpyFile(ActivationFile):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise DataError(
                f"activation file is truncated, damaged or not .npy: {path} ({error})"
            ) from error
        dtype = self._rows.dtype
        known = _FROM_NUMPY.get(dtype.newbyteorder("=").name)
        self._check("the array", self._rows.shape, known, str(dtype))
        if not self._rows.flags.c_contiguous:
            raise DataError(
                f"activation file has another layout: {path}: the array must be in row-major order"
            )

    def read(self, start: int, out: Tensor) -> None:
        np.copyto(out.numpy(), self._rows[start : start + len(out)])

    def close(self) -> None:
        del self._rows


class _SafetensorsFile(ActivationFile):
    def __init__(self, path: Path, name: str) -> None:
        safetensors = require("safetensors", f"reading {path}")
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(
                f"activation file is truncated, damaged or not safetensors: {path} ({error})"
            ) from error
        names = self._file.keys()
        if name not in names:
            listed = ", ".join(sorted(names)[:LISTED]) or "no tensor"
            raise DataError(
                f"activation file has another layout: {path} has no tensor {name!r}; it holds "
                f"{listed}{', ...' if len(names) > LISTED else ''}"
            )
        self._rows = self._file.get_slice(name)
        kind = self._rows.get_dtype()
        self._check(name, tuple(self._rows.get_shape()), _FROM_SAFETENSORS.get(kind), kind)

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._rows[start : start + len(out)])

    def directions(self) -> Tensor | None:
        if DIRECTIONS not in self._file.keys():
            return None
        directions = self._file.get_tensor(DIRECTIONS)
        self._check_directions(tuple(directions.shape))
        return directions.float()

    def close(self) -> None:
        del self._rows, self._file
