"""The counter of dead neurons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.checks import check_codes, check_count, check_floating
from ..ops.count_active import count_active
from .recomputation import recomputing, take
from .wrappers import in_join


class _Alone(NamedTuple):
    """What a process has counted since the processes last met."""

    base: torch.Tensor
    """int64 [n], the counts when they met."""
    since: torch.Tensor
    """int64 [n], its rows since a latent fired in it, `rows` where none did."""
    rows: int


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
        Where processes have different numbers of batches, each counts alone and takes the others to
        advance like itself: inside `no_sync`, and in a DistributedDataParallel once it was given to
        torch's Join (which never releases it). They meet when all call `synchronize` (say, after an
        epoch), or at the first update after `no_sync`. Where a latent fired in between is then
        known up to how evenly the processes advanced.

    Example:
        >>> import torch, sparsekern
        >>> counter = sparsekern.DeadNeuronCounter(3)
        >>> counter.update(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> counter.dead(1).tolist()
        [False, False, True]
    """

    rows_since_fired: torch.Tensor

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
        """Take in a batch: dense activations [..., n], or codes, or counts [n] with their number of
        rows.

        Args:
            activations: [..., n] floating point; a row is everything but the last dimension.
            indices: [..., k] int64 or int32, with values: [..., k]; zero values do not fire.
            counts: [n] int64 (see `count_active`), with rows: how many rows they were counted over.

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
        if not (self.distributed and _in_a_group()):
            take(self.rows_since_fired, torch.where(fired, 0, self.rows_since_fired + rows))
        elif self._alone is None and not self._counts_alone():
            self._meet(self.rows_since_fired, torch.where(fired, 0, rows), rows)
        else:
            self._count_alone(fired, rows)
            if not self._counts_alone():
                self.synchronize()

    # -- several processes -------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Updates inside count in this process alone, until an update outside or `synchronize`."""
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    @torch.no_grad()
    def synchronize(self) -> None:
        """Bring together what the processes counted alone; all of them must call it."""
        if not (self.distributed and _in_a_group()):
            return
        base = self.rows_since_fired
        alone = self._alone or _Alone(base, torch.zeros_like(base), 0)
        self._alone = None
        self._meet(alone.base.to(base.device), alone.since.to(base.device), alone.rows)

    def _counts_alone(self) -> bool:
        return self._no_sync or (not torch.compiler.is_compiling() and in_join())

    def _count_alone(self, fired: torch.Tensor, rows: int) -> None:
        count = self.rows_since_fired
        base, since, before = self._alone or _Alone(count.clone(), torch.zeros_like(count), 0)
        since = torch.where(fired, 0, since.to(count.device) + rows)
        alone = self._alone = _Alone(base.to(count.device), since, before + rows)
        elsewhere = alone.rows * torch.distributed.get_world_size()
        count.copy_(torch.where(since < alone.rows, since, alone.base + elsewhere))

    def _meet(self, base: torch.Tensor, since: torch.Tensor, rows: int) -> None:
        """Set the counts from those at the last meeting and from every process' rows since then
        and, for each latent, since it last fired (`rows` of them where it did not)."""
        place, n = torch.distributed.get_rank(), len(base)
        # When a latent last fired, as a share of a process' way, and what that way was.
        found = torch.zeros(
            n + torch.distributed.get_world_size(), dtype=torch.float64, device=base.device
        )
        found[:n] = torch.where(since < rows, 1 - since.double() / max(rows, 1), -1)
        found[n + place] = rows
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        last, total = found[:n], found[n:].sum()
        left = ((1 - last) * total).round().to(base.dtype)
        take(self.rows_since_fired, torch.where(last >= 0, left, base + total.to(base.dtype)))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._alone = None
        super()._load_from_state_dict(*args, **kwargs)

    # -- reading -----------------------------------------------------------------------------------

    def check_columns(self, layer: str, x: torch.Tensor) -> None:
        """Raise, in the name of a layer, where its input x [..., n] does not fit this counter."""
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
        """[n] bool: True where a latent has not fired for more than `threshold` rows."""
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise ValueError(
                "DeadNeuronCounter.dead: threshold must be a number of rows >= 0, "
                f"got {threshold!r}"
            )
        return self.rows_since_fired > threshold

    def fraction(self, threshold: int) -> torch.Tensor:
        """0-d float32 tensor in 0..1: the share of latents that are dead at `threshold` rows."""
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
        distributed = ", distributed=True" if self.distributed else ""
        return f"n={self.n}{distributed}"


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_counter(layer: str, counter: DeadNeuronCounter | None) -> DeadNeuronCounter | None:
    """The counter of a layer, or None."""
    if counter is not None and not isinstance(counter, DeadNeuronCounter):
        raise TypeError(f"{layer}: counter must be a DeadNeuronCounter or None, got {counter!r}")
    return counter
