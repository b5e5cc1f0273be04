"""Statistics over rows and latents that are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..nn.batch_topk import largest_of_parts
from ..sae.statistics import at_least_float32, divisor
from ..sae.statistics import total_variance as total_variance_here
from .collectives import Group
from .sharding import Shards


def total_variance(x: Tensor, group: Group) -> Tensor:
    """Return sum |x - mean over all rows|^2, of which each process has x [..., D].

    A scalar of at least float32; the rules of `sparsekern.sae.statistics.total_variance` hold.
    """
    if group.size == 1:
        return total_variance_here(x)
    rows = at_least_float32(x.reshape(-1, x.shape[-1]))
    with torch.no_grad():  # the variance does not change with what is subtracted from all rows
        # The mean of what the processes have first is near all rows, as one row is.
        near, have = group.sum(rows[:1].sum(0)), group.sum(rows.new_full((), float(len(rows) > 0)))
        near = near / have.clamp_min(1)
        count = group.sum(rows.new_full((), len(rows))).clamp_min(1)
        mean = group.sum((rows - near).sum(0)) / count
        rest = group.sum((rows - near - mean).sum(0)).square().sum() / count
    centred = rows - near - mean
    sums = group.total(torch.stack((centred.square().sum(), rows.square().sum())))
    return divisor(sums[0] - rest, sums[1])


@torch.no_grad()
def value_at_rank(parts: Iterable[Tensor], rank: int, shards: Shards) -> Tensor:
    """Return the rank-th largest (1 is the largest) of the scores of all rows and latents.

    parts: of the own rows and latents.
    """
    largest = largest_of_parts(parts, rank)
    for group in (shards.latents, shards.data):
        missing = (0, rank - len(largest))
        everything = group.gather_bytes(torch.nn.functional.pad(largest, missing, value=torch.nan))
        largest = largest_of_parts([everything[0][~everything[0].isnan()]], rank)
    return largest[-1]
