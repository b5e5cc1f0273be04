"""The counter of dead neurons."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.checks import check_codes, check_count, check_floating
from ..ops.count_active import count_active
from .recomputation import recomputing, take
from .wrappers import active_wrapper, has_other_processes, in_join


class _Alone(NamedTuple):
    """Counts of one process since the last exchange with the others."""

    base: torch.Tensor
    """int64 [n], the counts after that exchange."""
    since: torch.Tensor
    """int64 [n], rows of this process since a latent fired in it; `rows` where it did not."""
    rows: int
    """Rows of this process since that exchange."""


class DeadNeuronCounter(nn.Module):
    """Count, for each of n latents, the rows (tokens) since it last fired.

    A latent fires in a row when its activation there is not zero. An update with B rows sets the
    count of every latent that fired in one of them to 0 and adds B to all others. Nothing waits for
    the device.

    An update from inside a backward pass changes nothing: it is the second forward pass of gradient
    checkpointing, whose first was counted.

    Args:
        n: number of latents, at least 1.
        distributed: count the rows of all processes of torch.distributed's default group, which
            must update together (data-parallel training): a latent then dies after so many rows of
            the whole batch, and has fired when it did in any process. One all-reduce of n + W
            numbers an update for W processes; without an initialized group it changes nothing.
            Reading the counts never waits for another process.
        device: where the buffers live.

    Attributes:
        rows_since_fired: [n] int64, saved with the model. A new latent starts at 0.

    Note:
        Processes with different numbers of batches count alone: inside `no_sync`, and in a
        DistributedDataParallel from the time on that it is given to torch's Join. Each then assumes
        that the others have as many rows. They exchange their counts when all call `synchronize`
        (say, after an epoch), or at the first update after `no_sync`. The count of a latent that
        fired in between is then exact if the processes advanced evenly.

    Example:
        >>> import torch, sparsekern
        >>> counter = sparsekern.DeadNeuronCounter(3)
        >>> counter.update(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> counter.dead(1).tolist()
        [False, False, True]
    """

    rows_since_fired: torch.Tensor
    _warned = False

    def __init__(
        self,
        n: int,
        *,
        distributed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.distributed = distributed
        self._alone: _Alone | None = None
        self._no_sync = False
        self.n = check_count("DeadNeuronCounter", "n", n, 2**31 - 1, "the number of latents")
        self.register_buffer(
            "rows_since_fired", torch.zeros(self.n, dtype=torch.int64, device=device)
        )

    @torch.no_grad()
    def update(
        self,
        activations: torch.Tensor | None = None,
        *,
        indices: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        """Count a batch, given as dense activations, as codes, or as counts with their rows.

        Args:
            activations: [..., n] floating point; a row is everything but the last dimension.
            indices: [..., k] int64 or int32.
            values: [..., k], with indices; zero values do not fire.
            counts: [n] int64 (see `count_active`), with rows.
            rows: number of rows that the counts were made over.

        Raises:
            TypeError, ValueError: not exactly one of the three forms, or shapes that do not fit.
        """
        op = "DeadNeuronCounter.update"
        if sum(form is not None for form in (activations, indices, counts)) != 1:
            raise TypeError(f"{op}: give exactly one of activations, indices or counts")
        if values is not None and indices is None:
            raise TypeError(f"{op}: values belong to indices, which are not given")
        if rows is not None and counts is None:
            raise TypeError(f"{op}: rows belong to counts, which are not given")
        if activations is not None:
            check_floating(op, "activations", activations)
            self._check_width(activations, "activations")
            fired = (activations != 0).reshape(-1, self.n).any(0)
            rows = activations.numel() // self.n
        elif indices is not None:
            check_codes(op, values, indices)
            fired = count_active(indices, self.n, values) > 0
            rows = indices.numel() // max(indices.shape[-1], 1)
        else:
            if counts is None or rows is None:
                raise TypeError(f"{op}: counts need rows, the number of rows counted over")
            if not isinstance(rows, int | torch.SymInt) or isinstance(rows, bool) or rows < 0:
                raise ValueError(f"{op}: rows must be an integer of at least 0, got {rows!r}")
            if counts.shape != (self.n,) or counts.is_floating_point():
                raise ValueError(
                    f"{op}: counts must be [{self.n}] integers, got {list(counts.shape)} of "
                    f"{counts.dtype}"
                )
            fired = counts > 0
        if recomputing():
            return
        if not (self.distributed and _in_process_group()):
            if active_wrapper() is not None:
                self.warn_alone()
            take(self.rows_since_fired, torch.where(fired, 0, self.rows_since_fired + rows))
        elif self._alone is None and not self._counts_alone():
            self._exchange(self.rows_since_fired, torch.where(fired, 0, rows), rows)
        else:
            self._count_alone(fired, rows)
            if not self._counts_alone():
                self.synchronize()

    def warn_alone(self) -> None:
        """Warn, once, that this process counts its own rows in training of several."""
        if self.distributed or self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        if has_other_processes():
            warnings.warn(
                "DeadNeuronCounter: it counts the rows of this process alone, while several train "
                "the model (DistributedDataParallel keeps the counts of the first): "
                "distributed=True counts those of all",
                stacklevel=2,
            )

    # -- several processes -------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let updates inside count in this process alone, until one outside or `synchronize`."""
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    @torch.no_grad()
    def synchronize(self) -> None:
        """Combine what the processes counted alone; all of them must call it."""
        if not (self.distributed and _in_process_group()):
            return
        base = self.rows_since_fired
        alone = self._alone or _Alone(base, torch.zeros_like(base), 0)
        self._alone = None
        self._exchange(alone.base.to(base.device), alone.since.to(base.device), alone.rows)

    def _counts_alone(self) -> bool:
        return self._no_sync or (not torch.compiler.is_compiling() and in_join())

    def _count_alone(self, fired: torch.Tensor, rows: int) -> None:
        count = self.rows_since_fired
        base, since, before = self._alone or _Alone(count.clone(), torch.zeros_like(count), 0)
        since = torch.where(fired, 0, since.to(count.device) + rows)
        alone = self._alone = _Alone(base.to(count.device), since, before + rows)
        all_rows = alone.rows * torch.distributed.get_world_size()
        count.copy_(torch.where(since < alone.rows, since, alone.base + all_rows))

    def _exchange(self, base: torch.Tensor, since: torch.Tensor, rows: int) -> None:
        """Set the counts from those of all processes.

        Args:
            base: int64 [n], the counts after the last exchange.
            since: int64 [n], rows of this process since a latent last fired; `rows` where it did
                not.
            rows: of this process since the last exchange.
        """
        rank, n = torch.distributed.get_rank(), len(base)
        # First n: when each latent last fired, as a share of the process's rows, or -1. Then the
        # rows of each process.
        shared = torch.zeros(
            n + torch.distributed.get_world_size(), dtype=torch.float64, device=base.device
        )
        shared[:n] = torch.where(since < rows, 1 - since.double() / max(rows, 1), -1)
        shared[n + rank] = rows
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        last_fired, total = shared[:n], shared[n:].sum()
        since_fired = ((1 - last_fired) * total).round().to(base.dtype)
        not_fired = base + total.to(base.dtype)
        take(self.rows_since_fired, torch.where(last_fired >= 0, since_fired, not_fired))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._alone = None
        super()._load_from_state_dict(*args, **kwargs)

    # -- reading -----------------------------------------------------------------------------------

    def check_columns(self, layer: str, x: torch.Tensor) -> None:
        """Check that the input x [..., n] of a layer fits this counter; errors name the layer."""
        if isinstance(x, torch.Tensor) and x.shape[-1:] != (self.n,):
            raise ValueError(
                f"{layer}: the last dimension of x must be the counter's n = {self.n}, "
                f"got {list(x.shape)}"
            )

    def _check_width(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.shape[-1] != self.n:
            raise ValueError(
                f"DeadNeuronCounter.update: the last dimension of {name} must be n = {self.n}, "
                f"got {list(tensor.shape)}"
            )

    def dead(self, threshold: int) -> torch.Tensor:
        """Return True [n] for each latent that has not fired for more than `threshold` rows."""
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise ValueError(
                "DeadNeuronCounter.dead: threshold must be a number of rows >= 0, "
                f"got {threshold!r}"
            )
        return self.rows_since_fired > threshold

    def fraction(self, threshold: int) -> torch.Tensor:
        """Return the share of latents that are dead at `threshold` rows: 0-d float32 in 0..1."""
        return self.dead(threshold).float().mean()

    def reset(self, latents: torch.Tensor | None = None) -> None:
        """Start counting anew for all latents, or for those where the [n] bool mask is True."""
        if latents is None:
            self._alone = None
            self.rows_since_fired.zero_()
            return
        self.rows_since_fired.masked_fill_(latents, 0)
        if self._alone is not None:
            base, since = (t.masked_fill(latents.to(t.device), 0) for t in self._alone[:2])
            self._alone = self._alone._replace(base=base, since=since)

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        distributed = ", distributed=True" if self.distributed else ""
        return f"n={self.n}{distributed}"


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_counter(layer: str, counter: DeadNeuronCounter | None) -> DeadNeuronCounter | None:
    """Return the counter of a layer, or None; raise for anything else."""
    if counter is not None and not isinstance(counter, DeadNeuronCounter):
        raise TypeError(f"{layer}: counter must be a DeadNeuronCounter or None, got {counter!r}")
    return counter
