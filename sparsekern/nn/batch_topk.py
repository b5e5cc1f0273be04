"""BatchTopK: k latents per row on average over a batch, a fixed threshold in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..dispatch.transforms import unwrapped
from ..ops.batch_topk import batch_mask, batch_mask_of, check_share, kept_in_all
from ..ops.checks import check_floating
from ..ops.codes import Codes
from ..ops.count_active import count_active
from ..ops.jumprelu import at_most
from .averages import keep_dtype
from .codes import codes_where
from .counter import DeadNeuronCounter, check_counter
from .recomputation import recomputing, take
from .rows_of_all import gather_from_all, rows_of_all, select_among_all
from .saved_k import SavedK
from .wrappers import has_other_processes, in_join

# The threshold of the next batch is extrapolated from a line through those of the last batches. The
# line's memory is as many batches as hold 2000 kept entries, which leaves 3 % of noise in L0, and
# at least 5 batches.
REMEMBERED_ENTRIES = 2000
REMEMBERED_BATCHES = 5
# Added to the variance of the ages: shrinks a slope that few batches support.
SLOPE_PRIOR = 1.0
# Largest factor between the smallest entry of a batch and the threshold for the next.
LARGEST_CHANGE = 2.0
# After a relative change of k by more than this, the batches before are forgotten.
JUMP_OF_K = 0.1

# Of the entries of all parts, returns that of a rank (1 is the largest).
ValueAtRank = Callable[[Iterable[torch.Tensor], int], torch.Tensor]

# Private in torch; without it compiled code does not check.
_assert_async = getattr(torch, "_assert_async", None)
_UNSET = (
    "BatchTopK: threshold must be set before evaluation, by a batch in training mode with a "
    "positive activation or from a state_dict that has it, got nan"
)


class BatchTopK(SavedK):
    """Keep the k*B largest entries of a batch of B rows; in evaluation, those above a threshold.

    The threshold makes the evaluation of a row independent of the rest of its batch.

    Equivalent PyTorch::

        y = sparsekern.batch_topk(x, k, relu=True)  # training
        y = x * (x > threshold)                     # evaluation

    Args:
        k: how many to keep per row on average, an integer of at least 1 or a float above 0. The
            attribute may be changed at any time during training.
        momentum: None follows the thresholds of the batches and their trend (see Note). A number in
            0..1 and below 1 takes their running average instead: the share of the old threshold in
            the new one. It lags behind scores or a k that fall.
        counter: a `DeadNeuronCounter` that is updated by each forward pass in training mode.
        distributed: select among the rows of all processes of torch.distributed's default group,
            which must call the layer together; the threshold is then the same in all of them.
        device: where the threshold lives.

    Attributes:
        threshold: 0-d float32 buffer, saved with the model: estimate of the smallest positive entry
            kept in the next batch in training mode; NaN before the first one. It stays float32 in a
            layer that is converted to another dtype.
        trend: [6] float32 buffer, saved with the model: sums over the last batches, from which the
            threshold follows; None with a momentum. A state_dict without it is loaded, too.

    Shape: x [..., n] floating point -> [..., n] of the same dtype; B is the product of the leading
    dimensions.

    Raises:
        TypeError, ValueError: k or momentum is not a number or out of its range.
        RuntimeError: evaluation with a threshold that was never set.

    Note:
        ReLU comes after the selection: a kept entry that it sets to zero gets no gradient and does
        not count as firing. Under torch.compile, a schedule of k compiles once, of k with fractions
        once per power of two. On a GPU the host waits in training mode as in `batch_topk`, in
        evaluation once after a state_dict was loaded (compiled code never waits: the device reports
        a threshold that is not set).

        A line is fitted to the smallest kept entries of the last batches, older ones with less
        weight, and the threshold is its value for the next batch. So it follows falling scores and
        a schedule of k without a lag, from the first batch on. `calibrate` computes it from given
        rows; use it at the end of training. In data-parallel training without `distributed`, a
        batch and its threshold are those of one process (DistributedDataParallel keeps that of the
        first). With it, each process sends as many values as all keep together, and the host waits.

    Source: Bussmann, Leask and Nanda 2024, BatchTopK sparse autoencoders (arXiv 2412.06410),
    section 3; the line through the batches stands for the expectation in its equation for theta.

    Example:
        >>> import torch, sparsekern
        >>> layer = sparsekern.BatchTopK(1)
        >>> layer(torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.2, 0.1]])).tolist()
        [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
        >>> layer.eval()(torch.tensor([[3.0, 1.0, 2.5]])).tolist()  # above 2
        [[3.0, 0.0, 2.5]]
    """

    distributed = False  # of layers that a version without it pickled
    threshold: torch.Tensor
    trend: torch.Tensor | None

    def __init__(
        self,
        k: int | float,
        *,
        momentum: float | None = None,
        counter: DeadNeuronCounter | None = None,
        distributed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.distributed = distributed
        _check_momentum(momentum)
        self.k = k
        self.momentum = momentum
        self.counter = check_counter("BatchTopK", counter)
        self.register_buffer(
            "threshold", torch.tensor(torch.nan, dtype=torch.float32, device=device)
        )
        # Weighted sums over the batches: 1, age, age^2, threshold, age * threshold; and the last k.
        trend = torch.zeros(6, dtype=torch.float32, device=device) if momentum is None else None
        self.register_buffer("trend", trend)
        self._known = False  # True once this threshold was read and is not NaN

    @property
    def k(self) -> int | float:
        """Number of entries that a row keeps on average."""
        k: int | float = self._stored_k()
        return k

    @k.setter
    def k(self, k: int | float) -> None:
        self._store_k(check_share("BatchTopK", "k", k, 2**31 - 1, "the largest index"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., n], dense, for x [..., n]."""
        masked: torch.Tensor
        if not self.training:
            check_floating("BatchTopK", "x", x)
            return torch.where(at_most(x, self.known_threshold()), 0, x)
        if self.counter is not None:
            self.counter.check_columns("BatchTopK", x)
        if self.distributed and has_other_processes():
            select = self._mask_among_all
            if torch.compiler.is_compiling():
                select = torch.compiler.disable(select)  # sizes follow from what is selected
            masked, values, positions = select(x)
        else:
            masked, values, positions = batch_mask(x, self.k, relu=True)
            self.observe(values.detach())
        if self.counter is not None:
            n = x.shape[-1]
            counts = count_active(positions % n, n, values.detach())
            self.counter.update(counts=counts, rows=math.prod(x.shape[:-1]))
        return masked

    def _mask_among_all(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `batch_mask` does, with what is kept in the rows of all processes."""
        check_floating("BatchTopK", "x", x)
        if in_join():
            raise RuntimeError(
                "BatchTopK: distributed must be False under torch's Join, where processes have "
                "different numbers of batches"
            )
        k = check_share("BatchTopK", "k", self.k, x.shape[-1], "the size of the last dimension")
        here, kept = select_among_all(x.detach(), k)
        self.observe(kept)
        return batch_mask_of(x, here, relu=True)

    def codes(self, x: torch.Tensor) -> Codes:
        """Return the codes of x [..., n]: values [..., K], indices int64 [..., K], ascending.

        K is the largest number of active latents in a row, for which the host waits for the device;
        shorter rows are filled with other latents and their zeros.
        """
        y = self(x)
        return codes_where(y, y.detach() != 0)

    @torch.no_grad()
    def observe(self, kept: torch.Tensor) -> None:
        """Update the threshold with the smallest positive of a batch's kept values, if any."""
        if kept.numel() == 0 or recomputing():
            return
        positive = kept > 0
        smallest = torch.where(positive, kept, torch.inf).amin().to(self.threshold.dtype)
        if self.trend is None:
            new_threshold = torch.lerp(smallest, self.threshold, self.momentum or 0.0)
            new_threshold = torch.where(self.threshold.isnan(), smallest, new_threshold)
        else:
            k = torch.full((), self.k, dtype=torch.float32, device=kept.device)
            trend = _add_batch(self.trend, smallest, positive.sum(), k)
            new_threshold = _extrapolate(trend, smallest)
            take(self.trend, torch.where(smallest < torch.inf, trend, self.trend))
        take(self.threshold, torch.where(smallest < torch.inf, new_threshold, self.threshold))

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """Set the threshold so that rows of x have k active entries on average in evaluation.

        Rows keep all their positive entries where these are fewer.

        Args:
            x: [..., n] floating point.

        Raises:
            ValueError: x has no rows.
        """
        check_floating("BatchTopK.calibrate", "x", x)
        rows = math.prod(x.shape[:-1])
        if self.distributed and has_other_processes():
            rows = rows_of_all(rows, x.device)
            self.calibrate_parts([x], rows, value_at_rank=_value_at_rank_of_all)
        else:
            self.calibrate_parts([x], rows)

    @torch.no_grad()
    def calibrate_parts(
        self,
        parts: Iterable[torch.Tensor],
        rows: int,
        k: int | float | None = None,
        value_at_rank: ValueAtRank | None = None,
    ) -> None:
        """Calibrate from x in parts with so many rows together, and for another k if given.

        value_at_rank: searches the parts, where other processes have some, too.
        """
        if rows < 1:
            raise ValueError("BatchTopK.calibrate: x must have at least one row, got none")
        search = value_at_rank or value_at_rank_of_parts
        new_threshold = search(parts, kept_in_all("BatchTopK", k or self.k, rows) + 1)
        self.threshold.copy_(new_threshold.clamp_min(0))
        self._known = False

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Adapt the threshold to x that is multiplied by a factor above 0 from now on."""
        self.threshold.mul_(factor)
        if self.trend is not None:
            self.trend[3:5].mul_(factor)  # the sums of thresholds

    def known_threshold(self) -> torch.Tensor:
        """Return the threshold, 0-d; raise if it was never set.

        The host waits for the device at most once.
        """
        if torch.compiler.is_compiling():
            if _assert_async is not None:
                _assert_async(~self.threshold.isnan(), _UNSET)
        elif not self._known and not self.threshold.is_meta:
            # Under torch.func.stack_module_state it has the thresholds of several models.
            if bool(unwrapped(self.threshold).isnan().any()):
                raise RuntimeError(_UNSET)
            self._known = self.threshold.is_cuda
        return self.threshold

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self._known = False
        if self.trend is not None and f"{prefix}threshold" in state:
            # The state is of a layer with momentum, or from before there was a trend.
            state.setdefault(f"{prefix}trend", torch.zeros_like(self.trend))
        super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> BatchTopK:
        old_threshold, old_trend = self.threshold, self.trend
        self._known = False
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self.threshold = keep_dtype(old_threshold, self.threshold)
        if self.trend is not None and old_trend is not None:
            self.trend = keep_dtype(old_trend, self.trend)
        return self

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        shared = ", distributed=True" if self.distributed else ""
        return f"k={self.k}{shared}" + (
            "" if self.momentum is None else f", momentum={self.momentum}"
        )


def _check_momentum(momentum: float | None) -> None:
    if momentum is None:
        return
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"BatchTopK: momentum must be a number, got {momentum!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"BatchTopK: momentum must be in 0..1 and below 1, got {momentum}")


def _add_batch(
    trend: torch.Tensor, smallest: torch.Tensor, entries: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """Return the sums over the batches [6] with one more batch, all of it 0-d tensors.

    smallest: its smallest positive kept entry. entries: their number. k: as it was set.
    """
    count, age, age_squared, total, aged_total, last_k = trend.unbind()
    memory = (REMEMBERED_ENTRIES / entries.clamp_min(1)).clamp_min(REMEMBERED_BATCHES)
    decay = torch.where((k - last_k).abs() > JUMP_OF_K * last_k, 0.0, 1 - 1 / memory)
    older = torch.stack((
        count, age + count, age_squared + 2 * age + count, total, aged_total + total
    ))  # fmt: skip
    newest = torch.stack((
        torch.ones_like(smallest), smallest.new_zeros(()), smallest.new_zeros(()), smallest,
        smallest.new_zeros(()),
    ))  # fmt: skip
    return torch.cat((decay * older + newest, k.reshape(1)))


def _extrapolate(trend: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
    """Return the threshold of the next batch, of age -1, on the line through the last ones."""
    count, age, age_squared, total, aged_total, _ = trend.unbind()
    age_variance = count * (age_squared + SLOPE_PRIOR) - age * age
    slope = (count * aged_total - age * total) / age_variance  # per batch of age
    level = (total - slope * age) / count
    return (level - slope).clamp(smallest / LARGEST_CHANGE, smallest * LARGEST_CHANGE)


def value_at_rank_of_parts(parts: Iterable[torch.Tensor], rank: int) -> torch.Tensor:
    """Return the rank-th largest (1 is the largest) of the entries of all parts.

    Returns:
        0-d float32 (float64 for float64); the smallest entry where there are fewer.
    """
    return largest_of_parts(parts, rank)[-1]


def _value_at_rank_of_all(parts: Iterable[torch.Tensor], rank: int) -> torch.Tensor:
    """Return what `value_at_rank_of_parts` does, of the parts of all processes."""
    largest = largest_of_parts(parts, rank)
    padded = torch.nn.functional.pad(largest, (0, rank - len(largest)), value=torch.nan)
    every = torch.cat(gather_from_all(padded))
    return value_at_rank_of_parts([every[~every.isnan()]], rank)


def largest_of_parts(parts: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Return the largest of the entries of all parts, largest first.

    Returns:
        [count] float32 (float64 for float64), or all entries where there are fewer. Memory: 2 *
        count entries and a part.
    """
    kept: torch.Tensor | None = None
    for part in parts:
        entries = part.reshape(-1).to(torch.promote_types(part.dtype, torch.float32))
        if kept is not None and len(kept) == count:
            entries = entries[entries > kept[-1]]
        kept = entries if kept is None else torch.cat((kept, entries))
        kept = kept.topk(min(count, len(kept))).values
    if kept is None or len(kept) == 0:
        raise ValueError("largest_of_parts: parts must have at least one entry, got none")
    return kept
