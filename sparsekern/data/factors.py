"""What the data sets with known factors have in common: numbering, subsets, reading in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class DataError(ValueError):
    """A data file is missing, damaged, or not laid out as expected."""


class CountError(DataError):
    """A data set has fewer images than were asked for."""


def classes_of(indices: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Factor classes int64 ``[n, f]`` of image numbers ``[n]``; the last factor changes fastest."""
    indices, count = np.asarray(indices, dtype=np.int64), int(np.prod(sizes))
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise ValueError(
            f"classes_of: indices must lie in 0..{count - 1}, got {indices.min()}..{indices.max()}"
        )
    return np.stack(np.unravel_index(indices, tuple(sizes)), axis=-1).astype(np.int64)


def checked_classes(function: str, classes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The classes as int64.

    Raises:
        ValueError: they are not integers ``[n, len(sizes)]`` below the sizes.
    """
    classes = np.asarray(classes)
    if classes.ndim != 2 or classes.shape[1] != len(sizes) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"{function}: classes must be integers of shape [n, {len(sizes)}], "
            f"got {classes.dtype} {list(classes.shape)}"
        )
    if ((classes < 0) | (classes >= np.array(sizes))).any():
        raise ValueError(f"{function}: classes must lie below {list(sizes)} per factor")
    return classes.astype(np.int64, copy=False)


def subset(function: str, available: int, count: int | None, seed: int) -> np.ndarray | None:
    """Numbers of a random subset; ``None`` for all. That of n images is the front of n + 1's.

    Raises:
        CountError: count is out of range.
    """
    if count is None:
        return None
    if not 1 <= count <= available:
        raise CountError(
            f"{function}: count must lie in 1..{available} (the number of images), got {count}"
        )
    return np.random.default_rng(seed).permutation(available)[:count]


def gather(
    blocks: Iterator[np.ndarray],
    wanted: np.ndarray | None,
    row_shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """The wanted rows, in the wanted order, of an array that comes in blocks of rows."""
    if wanted is None:
        return np.concatenate(list(blocks))
    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    out, start = np.empty((len(wanted), *row_shape), dtype), 0
    for block in blocks:
        first, last = np.searchsorted(ascending, [start, start + len(block)])
        out[order[first:last]] = block[ascending[first:last] - start]
        start += len(block)
    return out
