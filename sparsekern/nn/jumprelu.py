"""JumpReLU: a learned threshold per latent."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..ops.checks import check_above_zero, check_count
from ..ops.jumprelu import at_most, in_band, jumprelu, step
from ..ops.topk import Codes
from .codes import codes_where

__all__ = ["JumpReLU", "jumprelu", "step"]


class JumpReLU(nn.Module):
    """Keep what is above a learned threshold per latent; everything else becomes zero.

    Equivalent PyTorch, but for the gradient of the thresholds: ``x * (x > threshold)``

    Args:
        n: number of latents, at least 1.
        threshold: every latent's threshold at first, above 0.
        bandwidth: width of the band around a threshold whose elements give it a gradient, above 0.
            Both defaults are the paper's.
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
        loss: ``loss = mse + weight * layer.l0(x)``. Thresholds may have another dtype than x.

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
        threshold: float = 0.001,
        bandwidth: float = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n = check_count("JumpReLU", "n", n, 2**31 - 1, "the number of latents")
        check_above_zero("JumpReLU", "threshold", threshold)
        check_above_zero("JumpReLU", "bandwidth", bandwidth)
        self.bandwidth = float(bandwidth)
        self.log_threshold = nn.Parameter(
            torch.full((n,), math.log(threshold), device=device, dtype=dtype)
        )

    @property
    def threshold(self) -> torch.Tensor:
        """[n]: the threshold of each latent, differentiable."""
        return self.log_threshold.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., n], dense."""
        return jumprelu(x, self.threshold, self.bandwidth)

    def l0(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> 0-d: the mean number of active latents per row, in float32 (float64 for
        float64); its gradient, straight-through, goes to the thresholds alone."""
        active = step(x, self.threshold, self.bandwidth)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return active.sum(-1, dtype=wide).mean()

    def codes(self, x: torch.Tensor) -> Codes:
        """x [..., n] -> values [..., K] and indices int64 [..., K], ascending: what is active, and
        what is in the band while thresholds are trained, so that gradients are those of the dense
        layer.

        K is the largest number of these in a row, for which the host waits for the device; shorter
        rows are filled with other latents and their zeros.
        """
        y = self(x)
        with torch.no_grad():
            theta = self.threshold
            wanted = ~at_most(x, theta)
            if self.log_threshold.requires_grad and y.requires_grad:
                wanted |= in_band(x, theta, self.bandwidth)
        return codes_where(y, wanted)

    def extra_repr(self) -> str:
        return f"n={self.n}, bandwidth={self.bandwidth}"
