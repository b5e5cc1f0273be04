"""BatchTopK: k latents per row on average over a batch, a fixed threshold in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.activity import count_active
from ..ops.batch_topk import batch_mask, check_share
from ..ops.checks import check_floating
from ..ops.jumprelu import at_most
from ..ops.topk import Codes
from .codes import codes_where
from .counter import DeadNeuronCounter, check_counter

_UNSET = (
    "BatchTopK: threshold must be set before evaluation, by a batch in training mode with a "
    "positive activation or from a state_dict that has it, got nan"
)


class BatchTopK(nn.Module):
    """Keep the k*B largest entries of a batch of B rows in training; in evaluation, what is above
    a threshold, whatever else is in the batch.

    Equivalent PyTorch::

        y = sparsekern.batch_topk(x, k, relu=True)  # training
        y = x * (x > threshold)                     # evaluation

    Args:
        k: how many to keep per row on average, an integer of at least 1 or a float above 0. The
            attribute may be changed at any time during training.
        momentum: share of the old threshold in the new one, in 0..1 and below 1.
        counter: a `DeadNeuronCounter` that is updated by each forward pass in training mode.
        device: where the threshold lives.

    Attributes:
        threshold: 0-d float32 buffer, saved with the model: the running average, over batches in
            training mode, of the smallest positive entry kept. NaN until there is one. It stays
            float32 in a layer that is converted to another dtype.

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

        The threshold follows a falling k over about 1 / (1 - momentum) batches: let training end
        with so many at the last k. In data-parallel training, a batch and its threshold are those
        of one process.

    Source: Bussmann, Leask and Nanda 2024, BatchTopK sparse autoencoders (arXiv 2412.06410),
    section 3; the average over batches stands for the expectation in its equation for theta.

    Example:
        >>> import torch, sparsekern
        >>> layer = sparsekern.BatchTopK(1)
        >>> layer(torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.2, 0.1]])).tolist()
        [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
        >>> layer.eval()(torch.tensor([[3.0, 1.0, 2.5]])).tolist()  # above 2
        [[3.0, 0.0, 2.5]]
    """

    threshold: torch.Tensor

    def __init__(
        self,
        k: int | float,
        *,
        momentum: float = 0.99,
        counter: DeadNeuronCounter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
            raise TypeError(f"BatchTopK: momentum must be a number, got {momentum!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"BatchTopK: momentum must be in 0..1 and below 1, got {momentum}")
        self._exponent: int | None = None
        self.k = k
        self.momentum = momentum
        self.counter = check_counter("BatchTopK", counter)
        self.register_buffer("threshold", torch.tensor(torch.nan, device=device))
        self._known = False  # whether this threshold was seen to be a number

    @property
    def k(self) -> int | float:
        """How many entries a row keeps on average."""
        width = self._kept.shape[1]
        return width if self._exponent is None else width * 2.0**self._exponent

    @k.setter
    def k(self, k: int | float) -> None:
        k = check_share("BatchTopK", "k", k, 2**31 - 1, "the largest index")
        # The width of an empty tensor, so that torch.compile sees it change (see TopK.k): k itself,
        # or the 53 bits of a float, whose exponent changes only where k is halved or doubled.
        self._exponent = None
        if isinstance(k, float):
            fraction, exponent = math.frexp(k)
            k, self._exponent = int(fraction * 2**53), exponent - 53
        self._kept = torch.empty(0, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., n], dense."""
        if not self.training:
            check_floating("BatchTopK", "x", x)
            return torch.where(at_most(x, self.known_threshold()), 0, x)
        if self.counter is not None:
            self.counter.check_columns("BatchTopK", x)
        masked, values, positions = batch_mask(x, self.k, relu=True)
        self.observe(values.detach())
        if self.counter is not None:
            n = x.shape[-1]
            counts = count_active(positions % n, n, values.detach())
            self.counter.update(counts=counts, rows=math.prod(x.shape[:-1]))
        return masked

    def codes(self, x: torch.Tensor) -> Codes:
        """x [..., n] -> values [..., K] and indices int64 [..., K], ascending.

        K is the largest number of active latents in a row, for which the host waits for the device;
        shorter rows are filled with other latents and their zeros.
        """
        y = self(x)
        return codes_where(y, y.detach() != 0)

    @torch.no_grad()
    def observe(self, kept: torch.Tensor) -> None:
        """Take the smallest positive value of a batch into the threshold; nothing if there is
        none."""
        if kept.numel() == 0:
            return
        infinity = torch.inf
        smallest = torch.where(kept > 0, kept, infinity).amin().to(self.threshold.dtype)
        average = torch.lerp(smallest, self.threshold, self.momentum)
        average = torch.where(self.threshold.isnan(), smallest, average)
        self.threshold.copy_(torch.where(smallest < infinity, average, self.threshold))

    def known_threshold(self) -> torch.Tensor:
        """The threshold, 0-d; raises where it was never set, for which the host waits at most
        once."""
        if torch.compiler.is_compiling():
            torch._assert_async(~self.threshold.isnan(), _UNSET)
        elif not self._known:
            if bool(self.threshold.isnan()):
                raise RuntimeError(_UNSET)
            self._known = self.threshold.is_cuda
        return self.threshold

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known = False
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> BatchTopK:
        before, self._known = self.threshold, False
        super()._apply(fn, *args, **kwargs)
        if self.threshold.dtype != before.dtype:  # half(), to(dtype): too coarse for an average
            self.threshold = before.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        return f"k={self.k}, momentum={self.momentum}"
