"""Activations in ``.npy`` and safetensors files: a header, then all values in their order.

They are read, not mapped: a mapped file that gets shorter kills the process.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..._tensor_files import read_header as read_tensor_header
from ..errors import DataError
from ..hdf5 import DAMAGE, one_line
from ..npy import read_bytes, read_header
from .activation_file import DIRECTIONS, FROM_NUMPY, LISTED, ActivationFile

_FROM_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class _ArrayFile(ActivationFile):
    """A file whose rows lie one after the other from byte ``_start`` on."""

    kind: str
    _start: int

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        try:
            self._stream = open(path, "rb", buffering=0)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"activation file cannot be opened: {path} ({reason})") from error
        try:
            self.stamp = self._stamp()
            self._open(name)
        except DataError:
            self._stream.close()
            raise
        except DAMAGE as error:
            self._stream.close()
            raise DataError(
                f"activation file is truncated, damaged or not {self.kind}: {path} "
                f"({one_line(error)})"
            ) from error
        except BaseException:
            self._stream.close()
            raise

    def _open(self, name: str) -> None:
        raise NotImplementedError

    def _stat(self) -> os.stat_result:
        return os.fstat(self._stream.fileno())

    def _read(self, start: int, target: np.ndarray) -> None:
        row_bytes = self.features * self.dtype.itemsize
        read_bytes(self._stream.fileno(), self._start + start * row_bytes, target)

    def close(self) -> None:
        self._stream.close()


class NpyFile(_ArrayFile):
    """An array ``[tokens, D]``, in either byte order."""

    kind = ".npy"

    def _open(self, name: str) -> None:
        shape, fortran, dtype = read_header(self._stream)
        self._start = self._stream.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        self._swapped = not dtype.isnative
        self._set_layout(
            "the array", shape, FROM_NUMPY.get(dtype.newbyteorder("=").name), str(dtype)
        )
        if fortran:
            raise DataError(
                f"activation file has another layout: {self.path}: the array must be in "
                f"row-major order"
            )
        held, claimed = self.stamp[0] - self._start, prod(shape) * dtype.itemsize
        if held != claimed:
            raise EOFError(f"its header claims {claimed} bytes, it holds {held}")

    def _read(self, start: int, target: np.ndarray) -> None:
        super()._read(start, target)
        if self._swapped:
            target.byteswap(inplace=True)


class SafetensorsFile(_ArrayFile):
    """A tensor ``[tokens, D]`` among others."""

    kind = "safetensors"

    def _open(self, name: str) -> None:
        _, self._entries = read_tensor_header(self._stream)
        if name not in self._entries:
            listed = ", ".join(map(one_line, sorted(self._entries)[:LISTED])) or "no tensor"
            raise DataError(
                f"activation file has another layout: {self.path} has no tensor {name!r}; it holds "
                f"{listed}{', ...' if len(self._entries) > LISTED else ''}"
            )
        kind, shape, self._start, _ = self._entries[name]
        known = None if kind == "F64" else _FROM_SAFETENSORS.get(kind)
        self._set_layout(name, shape, known, kind)

    def directions(self) -> Tensor | None:
        """Read the true directions, float32 ``[n, D]``; None if the file holds none.

        Raises as :meth:`read`, and where they have another layout.
        """
        with self._refusing_damage(DIRECTIONS):
            if DIRECTIONS not in self._entries:
                return None
            kind, shape, start, _ = self._entries[DIRECTIONS]
            self._check_directions(shape)
            if kind not in _FROM_SAFETENSORS:
                raise DataError(
                    f"activation file has another layout: {self.path}: {DIRECTIONS} must be "
                    f"floating, got {kind}"
                )
            values = torch.empty(shape, dtype=_FROM_SAFETENSORS[kind])
            read_bytes(self._stream.fileno(), start, values.view(torch.uint8).numpy())
            self._check_unchanged()
            return values.float()
