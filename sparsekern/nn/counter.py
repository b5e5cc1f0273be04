"""The counter of dead neurons."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.activity import count_active
from ..ops.checks import check_codes, check_count, check_floating
from .recomputation import recomputing


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
            the whole batch, and has fired when it did in any process. One all-reduce of n + 1
            integers an update; without an initialized group it changes nothing.
        device: where the buffers live.

    Attributes:
        rows_since_fired: [n] int64, saved with the model. A new latent starts at 0.

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
        total: int | torch.Tensor = rows
        if self.distributed and torch.distributed.is_initialized():
            sums = torch.cat((fired.to(torch.int64), torch.full((1,), rows, device=fired.device)))
            torch.distributed.all_reduce(sums)
            fired, total = sums[:-1] > 0, sums[-1]
        self.rows_since_fired += total
        self.rows_since_fired.masked_fill_(fired, 0)

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
            self.rows_since_fired.zero_()
        else:
            self.rows_since_fired.masked_fill_(latents, 0)

    def extra_repr(self) -> str:
        distributed = ", distributed=True" if self.distributed else ""
        return f"n={self.n}{distributed}"


def check_counter(layer: str, counter: DeadNeuronCounter | None) -> DeadNeuronCounter | None:
    """The counter of a layer, or None."""
    if counter is not None and not isinstance(counter, DeadNeuronCounter):
        raise TypeError(f"{layer}: counter must be a DeadNeuronCounter or None, got {counter!r}")
    return counter
