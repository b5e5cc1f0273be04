"""What every kind of activation file offers, and the checks that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..hdf5 import DAMAGE, one_line

ACTIVATIONS = "activations"
DIRECTIONS = "directions"
DOCUMENTS, POSITIONS, TOKEN_IDS = "documents", "positions", "token_ids"
LISTED = 10
COLUMN_ROWS = 1 << 20  # of a column, read at a time

FROM_NUMPY = {"float32": torch.float32, "float16": torch.float16}


class ActivationFile:
    """An open file of activations.

    Attributes:
        path: the file.
        tokens: rows.
        features: D.
        dtype: float32, float16 or bfloat16, as read.
        chunk_rows: rows that the file stores together; 1 where any range costs the same.
        stamp: size and time of the last change when it was opened.
    """

    path: Path
    tokens: int
    features: int
    dtype: torch.dtype
    chunk_rows: int = 1
    stamp: tuple[int, int]

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out`` ``[rows, D]``, of the file's dtype and on the CPU, from row ``start`` on.

        Raises:
            DataError: the file is damaged there, or has changed since it was opened.
        """
        stop = start + len(out)
        target = (out.view(torch.uint16) if self.dtype == torch.bfloat16 else out).numpy()
        with self._refusing_damage(f"rows {start}..{stop - 1} cannot be read"):
            self._read(start, target)
            self._check_unchanged()

    def _read(self, start: int, target: np.ndarray) -> None:
        """Fill a contiguous array; bfloat16 as uint16."""
        raise NotImplementedError

    def directions(self) -> Tensor | None:
        """Read the true directions, float32 ``[n, D]``, if the file holds them."""
        return None

    def origins(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Read rows ``start`` to ``stop`` of a column of origins, int64; None if there is none."""
        return None

    @cached_property
    def documents(self) -> int:
        """One more than the largest number of a document; 0 where there is none."""
        largest = -1
        for start in range(0, self.tokens, COLUMN_ROWS):
            numbers = self.origins(DOCUMENTS, start, min(start + COLUMN_ROWS, self.tokens))
            if numbers is None:
                break
            largest = max(largest, int(numbers.max()))
        return largest + 1

    def close(self) -> None:
        """Release the file."""

    def _stat(self) -> os.stat_result:
        """Return the size and times of the open file, which another may have replaced by name."""
        raise NotImplementedError

    def _stamp(self) -> tuple[int, int]:
        status = self._stat()
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._stamp() != self.stamp:
            raise DataError(
                f"activation file has changed since it was opened: {self.path} (open it anew)"
            )

    @contextmanager
    def _refusing_damage(self, what: str = "") -> Iterator[None]:
        """Turn whatever goes wrong in reading a damaged file into a DataError."""
        try:
            yield
        except (DataError, ModuleNotFoundError):
            raise
        except DAMAGE as error:
            reason = f"{what} ({one_line(error)})" if what else one_line(error)
            raise DataError(
                f"activation file is truncated or damaged: {self.path}: {reason}"
            ) from error

    def _set_layout(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, got: str
    ) -> None:
        """Check what the file says about itself, and set the attributes."""
        where = f"activation file has another layout: {self.path}: {name}"
        if len(shape) != 2:
            raise DataError(f"{where} must be [tokens, D], got {list(shape)}")
        if dtype is None:
            raise DataError(
                f"{where} must be float32, float16 or bfloat16 (in HDF5 as uint16 with the "
                f"attribute dtype='bfloat16'), got {one_line(got)}"
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
