"""Batches of examples that are all there at once: rows in an order that can be taken up midway."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def permuted_rows(
    examples: int, batch_size: int, seed: int, epoch: int, first: int
) -> Iterator[Tensor]:
    """Start an epoch at batch ``first``, in an order that (seed, epoch) decide.

    The same as ``torch.from_numpy(order).split(batch_size)[first:]`` with
    ``order = numpy.random.default_rng((seed, epoch)).permutation(examples)``.

    Args:
        examples: number of rows, >= 1; each comes once an epoch.
        batch_size: rows a batch, >= 1; the last batch takes what is left.
        seed: >= 0.
        epoch: >= 0.
        first: number of batches to leave out, >= 0.

    Returns:
        row numbers, int64 [batch_size] on the CPU.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, least in (
        ("examples", examples, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
        ("first", first, 0),
    ):
        if value < least:
            raise ValueError(f"permuted_rows: {name} must be at least {least}, got {value}")
    order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(examples))
    return iter(order.split(min(batch_size, examples))[first:])
