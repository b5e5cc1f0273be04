"""Which latents a process owns.

Latents are dealt to V columns in turn, as cards are: latent i lies in row i // V of column i % V.
Each process owns neighbouring columns whole, so every prefix of the latents, which a Matryoshka
autoencoder trains by itself, is spread over all processes. A matrix [N, D] is stored as
[N / V, V, D] and cut along its second dimension: in order of memory that is the matrix itself, the
rows of a process ascend, and a checkpoint does not depend on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

COLUMNS = 64


def columns_for(latents: int) -> int:
    """Return the number of columns for so many latents: their least divisor of at least 64."""
    return next(v for v in range(min(COLUMNS, latents), latents + 1) if latents % v == 0)


@dataclass(frozen=True)
class Layout:
    """The latents of one process.

    Attributes:
        latents: N, of all processes.
        columns: V, a divisor of N.
        processes: that share them.
        rank: of this process among them.
    """

    latents: int
    columns: int
    processes: int
    rank: int

    @property
    def rows(self) -> int:
        """Latents of a column."""
        return self.latents // self.columns

    @property
    def widest(self) -> int:
        """Columns of the process that has most."""
        return -(-self.columns // self.processes)

    @property
    def first(self) -> int:
        """The first column of this process."""
        return min(self.rank * self.widest, self.columns)

    @property
    def width(self) -> int:
        """Columns of this process."""
        return min(self.first + self.widest, self.columns) - self.first

    @property
    def own(self) -> int:
        """Latents of this process."""
        return self.rows * self.width

    @property
    def largest(self) -> int:
        """Latents of the process that has most."""
        return self.rows * self.widest

    def of_all(self, own: Tensor) -> Tensor:
        """Return the latents of all processes that these of this process are."""
        if self.processes == 1:
            return own
        row = own.div(self.width, rounding_mode="floor")
        return own + row * (self.columns - self.width) + self.first

    def below(self, prefix: int) -> int:
        """Return how many of the first `prefix` latents this process owns."""
        whole, rest = divmod(prefix, self.columns)
        return whole * self.width + min(max(rest - self.first, 0), self.width)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the own rows of a tensor [N, ...], as a copy [own, ...]."""
        table = tensor.view(self.rows, self.columns, *tensor.shape[1:])
        part = table.narrow(1, self.first, self.width)
        return part.reshape(self.own, *tensor.shape[1:]).clone()
