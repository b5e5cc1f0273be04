"""``.npy`` files, and bytes from any place of an open file."""

from __future__ import annotations

import os
import threading
import tokenize
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

_SEEKING = threading.Lock()


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, whether in column-major order, and dtype; stop where the data begin.

    Raises:
        ValueError: the header is damaged or of an unknown version.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        # Differs in the encoding of field names, which no number type has.
        (3, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            known = ", ".join(f"{major}.{minor}" for major, minor in readers)
            major, minor = version
            raise ValueError(f"its header has version {major}.{minor}, known are {known}")
        shape, fortran, dtype = readers[version](stream)
    # numpy reads the header as Python and lets Python's errors through.
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype


class NpyArray:
    """An array in a ``.npy`` file, of which slices of the first dimension are read.

    It is not mapped: a mapped file that gets shorter kills the process.

    Raises:
        OSError: the file cannot be read.
        ValueError, EOFError: it is damaged, or holds Python objects.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "rb", buffering=0)
        try:
            self.shape, fortran, self.dtype = read_header(self._file)
            if self.dtype.hasobject:
                raise ValueError("it holds Python objects")
            self._start = self._file.tell()
            self._row = prod(self.shape[1:]) * self.dtype.itemsize
            held = os.fstat(self._file.fileno()).st_size - self._start
            claimed = prod(self.shape) * self.dtype.itemsize
            if held < claimed:
                raise EOFError(f"its header claims {claimed} bytes, it holds {held}")
            # Rows in column-major order lie apart from each other.
            self._whole = np.load(path) if fortran and len(self.shape) > 1 else None
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read a copy of neighbouring rows ``[n, ...]``, in the machine's byte order.

        Raises:
            EOFError: the file has become shorter.
        """
        start, stop, _ = rows.indices(len(self))
        if self._whole is not None:
            rows_in_memory: np.ndarray = self._whole[start:stop]
            return rows_in_memory.astype(self.dtype.newbyteorder("="))
        values = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        read_bytes(self._file.fileno(), self._start + start * self._row, values)
        return values if self.dtype.isnative else values.astype(self.dtype.newbyteorder("="))


def read_bytes(descriptor: int, offset: int, target: np.ndarray) -> None:
    """Fill a contiguous array from a byte of an open file on, whatever else reads that file.

    Args:
        descriptor: the system's.
        offset: of the first byte.
        target: contiguous, of any shape and dtype.

    Raises:
        EOFError: the file ends before.
    """
    left = target.reshape(-1).view(np.uint8).data if target.size else memoryview(b"")
    while left:
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [left], offset)
        else:
            with _SEEKING:
                os.lseek(descriptor, offset, os.SEEK_SET)
                piece = os.read(descriptor, len(left))
            count = len(piece)
            left[:count] = piece
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}")
        left, offset = left[count:], offset + count
