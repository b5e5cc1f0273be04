"""JumpReLU: a learned threshold per latent."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..dispatch.dtensors import check_alike
from ..ops.batch_topk import check_share, kept_in_all
from ..ops.checks import check_above_zero, check_count, check_floating
from ..ops.codes import Codes
from ..ops.jumprelu import at_most, in_band, jumprelu, step
from .batch_topk import ValueAtRank, value_at_rank_of_parts
from .codes import codes_where

__all__ = ["JumpReLU", "jumprelu", "step"]

RELATIVE_BANDWIDTH = 0.5


class JumpReLU(nn.Module):
    """Keep what is above a learned threshold per latent; everything else becomes zero.

    Equivalent PyTorch, but for the gradient of the thresholds: ``x * (x > threshold)``

    Args:
        n: number of latents, at least 1.
        threshold: every latent's threshold at first, above 0 (see also `calibrate`).
        bandwidth: width of the band around a threshold whose elements give it a gradient, above 0;
            None takes half of each threshold, so that thresholds learn alike at any scale of x.
            (The paper's 0.001 for both needs inputs of its scale and small learning rates.)
        device, dtype: of the parameter.

    Attributes:
        log_threshold: [n] parameter, so that thresholds stay positive.
        threshold: [n], exp(log_threshold).

    Shape: x [..., n] floating point -> [..., n] of the same dtype.

    Raises:
        TypeError, ValueError: n is not an integer of at least 1; threshold or bandwidth is not a
            number above 0; x does not have n columns.

    Note:
        Gradients are those of `jumprelu`: straight-through for the threshold. Train with a sparsity
        loss: ``loss = mse + weight * layer.l0(x)``, or, for a number of active latents,
        ``mse + (layer.l0(x) / target - 1) ** 2``; without one, nothing becomes sparse. Thresholds
        may have another dtype than x.

    Source: Rajamanoharan et al. 2024, Jumping ahead (arXiv 2407.14435).

    Example:
        >>> import torch, sparsekern
        >>> layer = sparsekern.JumpReLU(3, threshold=0.5)
        >>> x = torch.tensor([[0.4, 0.6, -1.0], [2.0, 0.1, 0.7]])
        >>> [[round(v, 2) for v in row] for row in layer(x).tolist()], layer.l0(x).item()
        ([[0.0, 0.6, 0.0], [2.0, 0.0, 0.7]], 1.5)
    """

    def __init__(
        self,
        n: int,
        *,
        threshold: float = 0.1,
        bandwidth: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n = check_count("JumpReLU", "n", n, 2**31 - 1, "the number of latents")
        check_above_zero("JumpReLU", "threshold", threshold)
        if bandwidth is not None:
            check_above_zero("JumpReLU", "bandwidth", bandwidth)
        self.bandwidth = None if bandwidth is None else float(bandwidth)
        self.log_threshold = nn.Parameter(
            torch.full((n,), math.log(threshold), device=device, dtype=dtype)
        )

    @property
    def threshold(self) -> torch.Tensor:
        """Threshold of each latent, [n], differentiable."""
        return self.log_threshold.exp()

    @property
    def band(self) -> tuple[float, bool]:
        """Bandwidth, and True if it is relative to each threshold: arguments of `jumprelu`."""
        return (RELATIVE_BANDWIDTH, True) if self.bandwidth is None else (self.bandwidth, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., n], dense, for x [..., n]."""
        return jumprelu(x, self.threshold, *self.band)

    def l0(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean number of active latents per row of x [..., n].

        Returns:
            0-d float32 (float64 for float64). Its gradient, straight-through, goes to the
            thresholds alone.
        """
        active = step(x, self.threshold, *self.band)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return active.sum(-1, dtype=dtype).mean()

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor, l0: float) -> None:
        """Scale all thresholds by one factor so that rows of x have l0 active latents on average.

        Rows keep all their positive entries where these are fewer.

        Args:
            x: [..., n] floating point.
            l0: number of active latents, above 0 and at most n.

        Raises:
            TypeError, ValueError: l0 is not a number above 0 and at most n, or x has no rows.
        """
        check_floating("JumpReLU.calibrate", "x", x)
        self.calibrate_parts([x], math.prod(x.shape[:-1]), l0)

    @torch.no_grad()
    def calibrate_parts(
        self,
        parts: Iterable[torch.Tensor],
        rows: int,
        l0: float,
        value_at_rank: ValueAtRank | None = None,
    ) -> None:
        """Calibrate from x in parts with so many rows together.

        value_at_rank: searches the parts, where other processes have some, too.
        """
        if rows < 1:
            raise ValueError("JumpReLU.calibrate: x must have at least one row, got none")
        l0 = check_share("JumpReLU.calibrate", "l0", l0, self.n, "the number of latents")
        theta = self.threshold
        multiples = (part / theta for part in parts)
        search = value_at_rank or value_at_rank_of_parts
        factor = search(multiples, kept_in_all("JumpReLU.calibrate", l0, rows) + 1)
        smallest = torch.finfo(self.log_threshold.dtype).tiny
        self.log_threshold.add_(factor.clamp_min(smallest).log())

    def codes(self, x: torch.Tensor) -> Codes:
        """Return the codes of x [..., n]: values [..., K], indices int64 [..., K], ascending.

        They are the active latents, and while thresholds are trained those in the band, so that
        gradients are those of the dense layer. K is the largest number of these in a row, for which
        the host waits for the device; shorter rows are filled with other latents and their zeros.
        """
        check_alike("JumpReLU.codes", x=x, log_threshold=self.log_threshold)
        y = self(x)
        with torch.no_grad():
            theta = self.threshold
            listed = ~at_most(x, theta)
            if self.log_threshold.requires_grad and y.requires_grad:
                listed |= in_band(x, theta, *self.band)
        return codes_where(y, listed)

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        return f"n={self.n}" + ("" if self.bandwidth is None else f", bandwidth={self.bandwidth}")
