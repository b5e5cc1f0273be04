"""Factors of variation, the numbering of their combinations, and rows chosen from files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import CountError, DataError

VALUE_TOLERANCE = 1e-5  # values in a file may have passed through float32


@dataclass(frozen=True)
class Factors:
    """Factors of variation, each with finitely many values, and the order of their combinations.

    Combination number ``sum(class * bases)``: the last factor changes fastest.

    Attributes:
        names: of the f factors.
        tables: the values of each, float64, by class.
    """

    names: tuple[str, ...]
    tables: tuple[np.ndarray, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes of each factor."""
        return tuple(len(table) for table in self.tables)

    @property
    def bases(self) -> np.ndarray:
        """What one class more of each factor adds to the number: int64 ``[f]``."""
        return np.cumprod((1, *self.sizes[:0:-1]))[::-1].copy()

    @property
    def count(self) -> int:
        """Number of combinations."""
        return int(np.prod(self.sizes))

    def classes_of(self, indices: np.ndarray) -> np.ndarray:
        """Convert combination numbers ``[...]`` to classes int64 ``[..., f]``.

        Raises:
            ValueError: a number is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.count):
            raise ValueError(
                f"classes_of: indices must lie in 0..{self.count - 1}, "
                f"got {indices.min()}..{indices.max()}"
            )
        return np.stack(np.unravel_index(indices, self.sizes), axis=-1).astype(np.int64)

    def index_of(self, classes: np.ndarray) -> np.ndarray:
        """Convert classes ``[..., f]`` to combination numbers int64 ``[...]``.

        Raises:
            ValueError: the classes are not integers of that shape, or out of range.
        """
        numbers: np.ndarray = self.checked("index_of", np.asarray(classes)).numpy() @ self.bases
        return numbers

    def values_of(self, classes: np.ndarray) -> np.ndarray:
        """Look up the values float64 ``[..., f]`` of classes ``[..., f]``.

        Raises:
            ValueError: the classes are not integers of that shape, or out of range.
        """
        classes = self.checked("values_of", np.asarray(classes)).numpy()
        return np.stack([table[classes[..., i]] for i, table in enumerate(self.tables)], axis=-1)

    def nearest(self, values: np.ndarray, where: str) -> np.ndarray:
        """Find the classes int64 ``[n, f]`` of values ``[n, f]`` on evenly spaced tables.

        Args:
            values: floating.
            where: how the message begins.

        Raises:
            DataError: a value is not in its table; ``where`` begins the message.
        """
        classes = np.empty(values.shape, np.int64)
        for i, (name, table) in enumerate(zip(self.names, self.tables, strict=True)):
            step = table[1] - table[0] if len(table) > 1 else 1.0
            near = np.nan_to_num(np.rint((values[:, i] - table[0]) / step))
            classes[:, i] = np.clip(near, 0, len(table) - 1)
            wrong = ~(np.abs(values[:, i] - table[classes[:, i]]) <= VALUE_TOLERANCE)
            if wrong.any():
                raise DataError(
                    f"{where} of {name} must lie on {table[0]:g}, {table[1]:g}, ..., "
                    f"{table[-1]:g}, got {values[wrong, i][0]:g}"
                )
        return classes

    def checked(self, function: str, classes: np.ndarray | Tensor) -> Tensor:
        """Convert the classes to int64 ``[..., f]``, those in a tensor on its device.

        Raises:
            ValueError: they are not integers ``[..., f]`` below the sizes.
        """
        if isinstance(classes, Tensor):
            kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
            is_integer = classes.dtype in kinds
        else:
            is_integer = classes.dtype.kind in "iu"
        if classes.ndim == 0 or classes.shape[-1] != len(self.names) or not is_integer:
            raise ValueError(
                f"{function}: classes must be integers of shape [..., {len(self.names)}], "
                f"got {str(classes.dtype).removeprefix('torch.')} {list(classes.shape)}"
            )
        if isinstance(classes, Tensor):
            numbers = classes.long()
        else:
            # A copy, since torch refuses to share memory that is read-only or runs backwards.
            numbers = torch.from_numpy(np.array(classes, np.int64))
        sizes = torch.tensor(self.sizes, device=numbers.device)
        if bool(((numbers < 0) | (numbers >= sizes)).any()):
            raise ValueError(f"{function}: classes must lie below {list(self.sizes)} per factor")
        return numbers


def check_seed(function: str, seed: int) -> None:
    """Raise ValueError if the seed is negative."""
    if seed < 0:
        raise ValueError(f"{function}: seed must be at least 0, got {seed}")


def check_count(function: str, available: int, count: int) -> None:
    """Raise CountError if there are fewer images, or the count is not positive."""
    if not 1 <= count <= available:
        raise CountError(
            f"{function}: count must lie in 1..{available} (the number of images), got {count}"
        )


def subset(function: str, available: int, count: int | None, seed: int) -> np.ndarray | None:
    """Choose a random subset: its numbers, or ``None`` for all.

    The subset of n images is the front of that of n + 1.

    Args:
        function: how messages begin.
        available: number of images.
        count: of the subset, 1..available; ``None`` for all.
        seed: chooses the subset.

    Returns:
        int64 ``[count]``, or ``None``.

    Raises:
        CountError: count is out of range.
        ValueError: seed is negative.
    """
    check_seed(function, seed)
    if count is None:
        return None
    check_count(function, available, count)
    return np.random.default_rng(seed).permutation(available)[:count]


def gather(
    blocks: Iterator[np.ndarray],
    wanted: np.ndarray | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Gather the wanted rows, in the wanted order, of an array that comes in blocks of rows.

    The array has ``shape``, the result ``[w, *shape[1:]]``.

    Memory is needed for the result and one block, also when all rows are wanted.

    Args:
        blocks: rows from first to last.
        wanted: their numbers, int64 ``[w]``; ``None`` for all.
        shape: of the whole array.
        dtype: of the result.
    """
    out, start = np.empty((shape[0] if wanted is None else len(wanted), *shape[1:]), dtype), 0
    if wanted is not None:
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
    for block in blocks:
        if wanted is None:
            out[start : start + len(block)] = block
        else:
            first, last = np.searchsorted(ascending, [start, start + len(block)])
            out[order[first:last]] = block[ascending[first:last] - start]
        start += len(block)
    return out
