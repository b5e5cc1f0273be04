"""Batches cut from groups of rows."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

# Up to this size torch works without its pool of threads, which the training step needs: two that
# ask for the cores at once wait for each other, on two cores a hundred times as long as they work.
SERIAL_ELEMENTS = 32768


def cut_batches(
    groups: Generator[tuple[Tensor, Tensor]],
    left: int,
    batch_size: int,
    dtype: torch.dtype,
    pin: bool,
) -> Generator[Tensor]:
    """Cut batches from the stream of groups, across their borders; ``left`` rows in all.

    Yields ``[<= batch_size, D]`` of ``dtype`` on the CPU, in pinned memory with ``pin``.

    Args:
        groups: rows ``[n, D]`` of each, and the order int64 to take them in; closed at the end.
        left: rows in all batches.
        batch_size: rows of a batch; the last one may have fewer.
        dtype: floating, of the batches.
        pin: put batches into pinned memory.
    """
    batch: Tensor | None = None
    filled = 0
    try:
        for rows, order in groups:
            piece = min(batch_size, max(1, SERIAL_ELEMENTS // rows.shape[1]))
            scratch = torch.empty(piece, rows.shape[1], dtype=rows.dtype)
            taken = 0
            while taken < len(order):
                if batch is None:
                    shape = (min(batch_size, left), rows.shape[1])
                    batch, filled = torch.empty(shape, dtype=dtype, pin_memory=pin), 0
                chosen = order[taken : taken + min(piece, len(batch) - filled)]
                gathered = torch.index_select(rows, 0, chosen, out=scratch[: len(chosen)])
                batch[filled : filled + len(chosen)] = gathered
                taken += len(chosen)
                filled += len(chosen)
                if filled == len(batch):
                    left -= filled
                    yield batch
                    batch = None
    finally:
        groups.close()
