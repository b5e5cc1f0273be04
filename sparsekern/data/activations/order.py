"""The order in which an epoch takes the rows of activation files, computed before anything is read.

A block is a range of neighbouring rows of one file. The blocks of an epoch, in a random order, are
packed into groups of at most ``buffer_rows`` rows; within a group the rows are shuffled. Random
numbers are the raw words of PCG64 seeded by ``(seed, epoch, 0)`` for the blocks and by
``(seed, epoch, 1 + group)`` for the rows: numpy keeps these streams the same in every version, so a
run resumes to the same order after an upgrade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .activation_file import ActivationFile

# Long enough that reading blocks in a random order costs little more than in their own.
BLOCK_BYTES = 1 << 20
# A group draws from at least this many places, where chunks are small enough.
BLOCKS_PER_GROUP = 16


@dataclass(frozen=True)
class EpochPlan:
    """The blocks and groups of one epoch.

    Attributes:
        blocks: int64 ``[blocks, 3]``: number of the file, first row, row after the last; in the
            order of the files.
        order: int64 ``[blocks]``, the blocks in the order of the epoch.
        bounds: int64 ``[groups + 1]``: group g is ``order[bounds[g] : bounds[g + 1]]``.
        first_rows: int64 ``[groups + 1]``: rows in the groups before, without those left out.
        capacity: rows of the largest group, those left out included.
        key: ``(seed, epoch)``; None for the order of the files.
    """

    blocks: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    first_rows: np.ndarray
    capacity: int
    key: tuple[int, int] | None

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.bounds) - 1

    def group_of(self, row: int) -> int:
        """Find the group that holds this row of the epoch; ``groups`` after the last row."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def blocks_of(self, group: int) -> list[list[int]]:
        """List a group's blocks in the order of the files: the rows are shuffled after reading."""
        chosen = np.sort(self.order[self.bounds[group] : self.bounds[group + 1]])
        blocks: list[list[int]] = self.blocks[chosen].tolist()
        return blocks

    def rows_of(self, group: int) -> Tensor:
        """Order a group's rows: int64, a permutation of those it keeps."""
        rows = int(self.first_rows[group + 1] - self.first_rows[group])
        if self.key is None:
            return torch.arange(rows)
        return torch.from_numpy(_permutation(rows, (*self.key, 1 + group)))


def plan_epoch(
    files: Sequence[ActivationFile],
    left_out: Sequence[np.ndarray],
    buffer_rows: int,
    key: tuple[int, int] | None,
) -> EpochPlan:
    """Plan the blocks and groups of an epoch.

    Args:
        files: in their order.
        left_out: for each file the rows that no batch takes, int64, ascending.
        buffer_rows: rows of a group, at most; those left out count.
        key: ``(seed, epoch)``; None for the order of the files.
    """
    blocks, kept_rows = [], []
    for number, (file, gone) in enumerate(zip(files, left_out, strict=True)):
        starts = np.arange(0, file.tokens, block_rows(file, buffer_rows))
        stops = np.append(starts[1:], file.tokens)
        blocks.append(np.stack([np.full(len(starts), number), starts, stops], axis=1))
        kept_rows.append(
            stops - starts - (np.searchsorted(gone, stops) - np.searchsorted(gone, starts))
        )
    all_blocks = np.concatenate(blocks)
    order = np.arange(len(all_blocks)) if key is None else _permutation(len(all_blocks), (*key, 0))
    sizes = (all_blocks[:, 2] - all_blocks[:, 1])[order]
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(order):
        room = ends[bounds[-1]] - sizes[bounds[-1]] + buffer_rows
        bounds.append(int(np.searchsorted(ends, room, side="right")))
    row_bounds = np.append(0, ends)[bounds]
    return EpochPlan(
        blocks=all_blocks,
        order=order,
        bounds=np.array(bounds),
        first_rows=np.append(0, np.cumsum(np.concatenate(kept_rows)[order]))[bounds],
        capacity=int(np.diff(row_bounds).max()),
        key=key,
    )


def block_rows(file: ActivationFile, buffer_rows: int) -> int:
    """Choose the rows of a block: whole chunks, about 1 MiB, as far as the buffer holds them.

    Args:
        file: which it is.
        buffer_rows: rows of a group, at most.
    """
    row_bytes = file.features * file.dtype.itemsize
    wanted = min(BLOCK_BYTES // row_bytes, buffer_rows // BLOCKS_PER_GROUP)
    return min(max(1, wanted // file.chunk_rows) * file.chunk_rows, buffer_rows)


def _permutation(count: int, key: tuple[int, ...]) -> np.ndarray:
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")
