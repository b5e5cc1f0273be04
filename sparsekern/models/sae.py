"""The top-k sparse autoencoder, with its auxiliary losses.

    codes          = topk((x - decoder_bias) @ encoder.T + encoder_bias, k), then ReLU
    reconstruction = codes @ dictionary + decoder_bias
    FVU            = sum |x - reconstruction|^2 / sum |x - mean over the batch of x|^2
    total          = FVU + auxk_weight * AuxK + multi_weight * FVU of the multi_k largest codes

AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2) lets dead latents explain what is left: with
e = x - reconstruction, held constant, and e' the reconstruction of e by the auxk largest scores
among the dead latents alone (without decoder_bias, which e does not contain),

    AuxK = min(1, dead / auxk) * sum |e - e'|^2 / sum |x - mean over the batch of x|^2

Multi-TopK (ibid., appendix A.3; 4 k with weight 1/8) keeps the autoencoder usable at other k.

The scores [B, N] are never stored, and the gradients of both matrices are sums over active codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import DeadNeuronCounter
from ..ops.checks import check_count
from ..ops.linear_topk import linear_topk
from ..ops.sparse_matmul import sparse_matmul
from ..ops.topk import Codes

MEDIAN_STEPS = 100
MEDIAN_TOLERANCE = 1e-6


class SAEOutput(NamedTuple):
    """What a forward pass gives: reconstruction [..., D], values [..., k] and indices [..., k]."""

    reconstruction: Tensor
    values: Tensor
    indices: Tensor


class SAELoss(NamedTuple):
    """The loss and its parts, scalars: total = fvu + auxk_weight * auxk + multi_weight * multi."""

    total: Tensor
    fvu: Tensor
    auxk: Tensor
    multi: Tensor


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with k of N latents active.

    Args:
        features: D, width of the activations it is trained on.
        latents: N, width of the sparse layer.
        k: active latents per row, 1..N; change it during training through :attr:`k`.
        auxk: dead latents per row in the auxiliary loss; 0 leaves it out. The paper takes a power
            of two near D / 2.
        auxk_weight: weight of that loss.
        multi_k: active latents per row in the second reconstruction; 0 leaves it out.
        multi_weight: weight of its FVU.
        dead_after: rows (tokens) without firing after which a latent is dead.
        tied: one matrix for encoder and dictionary.
        scale_scores: rank and decode by scores times the norms of the dictionary's rows (SAELens'
            rescale_acts_by_decoder_norm): the dictionary may then have rows of any norm.

    Attributes:
        encoder [N, D], encoder_bias [N], dictionary [N, D], decoder_bias [D]: the parameters. The
            dictionary's rows begin with norm 1, the encoder as its copy.
        counter: the :class:`DeadNeuronCounter`, updated by each forward pass in training mode.

    Raises:
        ValueError, TypeError: a size is not an integer or out of its range.

    Example:
        >>> import torch
        >>> model = SparseAutoencoder(16, 64, k=4)
        >>> output, loss = model.loss(torch.randn(8, 16))
        >>> output.indices.shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        features: int,
        latents: int,
        k: int,
        *,
        auxk: int = 0,
        auxk_weight: float = 1 / 32,
        multi_k: int = 0,
        multi_weight: float = 1 / 8,
        dead_after: int = 10_000_000,
        tied: bool = False,
        scale_scores: bool = False,
    ) -> None:
        super().__init__()
        check_count("SparseAutoencoder", "features", features, 2**31 - 1, "what a tensor can hold")
        check_count("SparseAutoencoder", "latents", latents, 2**31 - 1, "what an index can hold")
        for name, value in (("auxk", auxk), ("multi_k", multi_k)):
            if value:
                check_count("SparseAutoencoder", name, value, latents, "the number of latents")
        check_count("SparseAutoencoder", "dead_after", dead_after, 2**62, "rows")
        dictionary = nn.functional.normalize(torch.randn(latents, features), dim=1)
        self.dictionary = nn.Parameter(dictionary)
        self.encoder = self.dictionary if tied else nn.Parameter(dictionary.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder_bias = nn.Parameter(torch.zeros(features))
        self.counter = DeadNeuronCounter(latents)
        self.k = k
        self.auxk, self.auxk_weight = auxk, auxk_weight
        self.multi_k, self.multi_weight = multi_k, multi_weight
        self.dead_after = dead_after
        self.scale_scores = scale_scores

    @property
    def k(self) -> int:
        """Active latents per row."""
        return self._kept.shape[1]

    @k.setter
    def k(self, k: int) -> None:
        latents = len(self.dictionary)
        k = check_count("SparseAutoencoder", "k", k, latents, "the number of latents")
        self._kept = torch.empty(0, k)  # so that torch.compile sees it change: see TopK.k

    @property
    def tied(self) -> bool:
        """Whether encoder and dictionary are one matrix."""
        return self.encoder is self.dictionary

    # -- the parts of a forward pass ---------------------------------------------------------------

    def _norms(self) -> Tensor | None:
        return self.dictionary.norm(dim=1) if self.scale_scores else None

    def _unscaled(self, values: Tensor, indices: Tensor) -> Tensor:
        """Scores times norms -> factors of the dictionary's rows."""
        norms = self._norms()
        return values if norms is None else values / norms[indices].to(values.dtype)

    def encode(self, x: Tensor, k: int | None = None) -> Codes:
        """Codes of activations: x [..., D] -> values [..., k] and indices int64 [..., k].

        Args:
            x: floating point, of the parameters' dtype (or any, inside an autocast region).
            k: another number of active latents than :attr:`k`.
        """
        values, indices = linear_topk(
            x,
            self.encoder,
            self.encoder_bias,
            self.k if k is None else k,
            pre_bias=self.decoder_bias,
            scale=self._norms(),
        )
        return Codes(values, indices)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Reconstruction [..., D] of codes [..., k]."""
        factors = self._unscaled(values, indices)
        return sparse_matmul(factors, indices, self.dictionary, self.decoder_bias)

    def forward(self, x: Tensor) -> SAEOutput:
        """Reconstruct x [..., D]."""
        values, indices, transposition = linear_topk(
            x,
            self.encoder,
            self.encoder_bias,
            self.k,
            pre_bias=self.decoder_bias,
            scale=self._norms(),
            return_transposition=True,
        )
        factors = self._unscaled(values, indices)
        reconstruction = sparse_matmul(
            factors, indices, self.dictionary, self.decoder_bias, transposition=transposition
        )
        if self.training:
            self.counter.update(indices=indices, values=values.detach())
        return SAEOutput(reconstruction, values, indices)

    def loss(self, x: Tensor, variance: Tensor | None = None) -> tuple[SAEOutput, SAELoss]:
        """Reconstruct x [..., D] and compare: (output, loss).

        Args:
            x: floating point.
            variance: what the errors are divided by; None takes that of x. With the variance of a
                whole batch, the losses of its parts add up to that of the batch (except that AuxK
                takes the latents dead at each part).
        """
        output = self(x)
        variance = total_variance(x) if variance is None else variance
        fvu = squared_error(x, output.reconstruction) / variance
        auxk = self._auxk(x, output.reconstruction) / variance if self.auxk else fvu.new_zeros(())
        multi = self._multi(x) / variance if self.multi_k else fvu.new_zeros(())
        total = fvu + self.auxk_weight * auxk + self.multi_weight * multi
        return output, SAELoss(total, fvu, auxk, multi)

    def _auxk(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """min(1, dead / auxk) * sum |e - e'|^2. Counting the dead latents waits for the device."""
        dead = self.counter.dead(self.dead_after).nonzero().squeeze(1)
        if len(dead) == 0:
            return _at_least_float32(x.new_zeros(()))
        residual = (x - reconstruction).detach()
        values, indices = linear_topk(
            x,
            self.encoder,
            self.encoder_bias,
            min(self.auxk, len(dead)),
            pre_bias=self.decoder_bias,
            scale=self._norms(),
            latents=dead,
        )
        estimate = sparse_matmul(self._unscaled(values, indices), indices, self.dictionary)
        return min(1.0, len(dead) / self.auxk) * squared_error(residual, estimate)

    def _multi(self, x: Tensor) -> Tensor:
        return squared_error(x, self.decode(*self.encode(x, self.multi_k)))

    # -- the dictionary's norms --------------------------------------------------------------------

    @torch.no_grad()
    def normalize_dictionary(self) -> None:
        """Give every row of the dictionary norm 1."""
        self.dictionary.copy_(nn.functional.normalize(self.dictionary, dim=1))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Subtract from the dictionary's gradient what would only change the norms of its rows."""
        gradient, rows = self.dictionary.grad, self.dictionary
        if gradient is not None:
            share = (gradient * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
            gradient.sub_(share * rows)

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set decoder_bias to the geometric median of activations x [rows, D]."""
        self.decoder_bias.copy_(geometric_median(x))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total_variance(x: Tensor) -> Tensor:
    """sum |x - mean over rows|^2 of x [..., D], a scalar of at least float32; never zero."""
    rows = _at_least_float32(x.reshape(-1, x.shape[-1]))
    return (rows - rows.mean(0)).square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def squared_error(x: Tensor, estimate: Tensor) -> Tensor:
    """sum |x - estimate|^2 over everything, a scalar of at least float32."""
    return (_at_least_float32(x) - _at_least_float32(estimate)).square().sum()


@torch.no_grad()
def geometric_median(
    x: Tensor, steps: int = MEDIAN_STEPS, tolerance: float = MEDIAN_TOLERANCE
) -> Tensor:
    """The point with the least sum of distances to the rows of x [rows, D]: Weiszfeld's iteration.

    Args:
        x: at least one row, floating point.
        steps: at most so many iterations.
        tolerance: ends when the point moves by less than this share of the rows' mean distance.

    Returns:
        [D] of x's dtype.
    """
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(
            f"geometric_median: x must be [rows, D] with at least one row, got {list(x.shape)}"
        )
    rows = _at_least_float32(x)
    point = rows.mean(0)
    for _ in range(steps):
        distance = (rows - point).norm(dim=1)
        weights = 1 / distance.clamp_min(1e-12)
        moved = (weights @ rows) / weights.sum()
        done = (moved - point).norm() <= tolerance * distance.mean()
        point = moved
        if done:
            break
    return point.to(x.dtype)
