"""What a process has of a batch and of the latents, and how it makes numbers of the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models import SparseAutoencoder

if TYPE_CHECKING:
    from ...distributed import ShardedAutoencoder


class Parts:
    """All rows and all latents: one process has them."""

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return this process's share of rows [n, ...]."""
        return rows

    def local(self, parameter: Tensor) -> Tensor:
        """Return this process's latents of a parameter, in memory that it shares."""
        return parameter

    def sum_of_all(self, part: Tensor) -> Tensor:
        """Return a sum over all rows and latents from that over this process's."""
        return part

    def sum_of_rows(self, part: Tensor) -> Tensor:
        """Return a sum over all rows from that over this process's."""
        return part

    def of_latents(self, values: Tensor, *sums: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what all latents are needed for, from what this process knows of its own.

        Args:
            values: [rows, w], codes of these latents; w may be 0.
            sums: 0-d, over these latents.

        Returns:
            The smallest value of each row [rows], inf where there is none, and the sums.
        """
        return _smallest(values), list(sums)

    def largest_of_latents(self, part: Tensor) -> Tensor:
        """Return the largest over all latents from that over this process's, for each element."""
        return part

    def dead(self, model: SparseAutoencoder) -> Tensor:
        """Return the share of dead latents: 0-d float32."""
        return model.counter.fraction(model.dead_after)


class SharedParts(Parts):
    """The rows and latents of one of several processes."""

    def __init__(self, model: ShardedAutoencoder) -> None:
        self.shards = model.shards

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return this process's share of rows [n, ...]."""
        data = self.shards.data
        return rows.tensor_split(data.size)[data.rank]

    def local(self, parameter: Tensor) -> Tensor:
        """Return this process's latents of a parameter, in memory that it shares."""
        return self.shards.local(parameter)

    def sum_of_all(self, part: Tensor) -> Tensor:
        """Return a sum over all rows and latents from that over this process's."""
        return self.sum_of_rows(self.shards.latents.sum(part))

    def sum_of_rows(self, part: Tensor) -> Tensor:
        """Return a sum over all rows from that over this process's."""
        return self.shards.data.sum(part)

    def of_latents(self, values: Tensor, *sums: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what all latents are needed for, from what this process knows; one message."""
        smallest, *others = self.shards.latents.gather_bytes(_smallest(values), *sums)
        return smallest.amin(0), [one.sum(0) for one in others]

    def largest_of_latents(self, part: Tensor) -> Tensor:
        """Return the largest over all latents from that over this process's, for each element."""
        return self.shards.latents.largest(part)

    def dead(self, model: SparseAutoencoder) -> Tensor:
        """Return the share of dead latents: 0-d float32."""
        count = model.counter.dead(model.dead_after).sum()
        return self.shards.latents.sum(count).float() / self.shards.layout.latents


def _smallest(values: Tensor) -> Tensor:
    nothing = values.new_full((len(values), 1), torch.inf)
    return torch.cat((values, nothing), dim=1).amin(-1)


def parts_of(model: SparseAutoencoder) -> Parts:
    """Return what this process has of a model and its batches."""
    return SharedParts(model) if hasattr(model, "shards") else Parts()  # type: ignore[arg-type]
