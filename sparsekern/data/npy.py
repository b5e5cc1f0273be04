"""The header of a ``.npy`` file, and bytes from any place of an open file."""

from __future__ import annotations

import os
import threading
import tokenize
from typing import Any

import numpy as np

_SEEKING = threading.Lock()


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in column-major order, and dtype; leaves the stream where the data begin.

    Raises:
        ValueError: the header is damaged or of an unknown version.
    """
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        # Differs in the encoding of field names, which no number type has.
        (3, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        if version not in read:
            known = ", ".join(f"{major}.{minor}" for major, minor in read)
            major, minor = version
            raise ValueError(f"its header has version {major}.{minor}, known are {known}")
        shape, fortran, dtype = read[version](stream)
    # numpy reads the header as Python and lets Python's errors through.
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype


def read_bytes(descriptor: int, offset: int, target: np.ndarray) -> None:
    """Fills a contiguous array from a byte of an open file on, whatever else reads that file.

    Raises:
        EOFError: the file ends before.
    """
    left = target.reshape(-1).view(np.uint8).data
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
