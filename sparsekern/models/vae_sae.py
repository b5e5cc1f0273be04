"""The VAE-SAE hybrid: a convolutional VAE with a sparse layer, at one of three places.

    images -> convolutions -> features [hidden] -> mean, log variance of z ~ N(mean, variance)   [Z]
    z -> hidden -> transposed convolutions -> Bernoulli logits of the pixels

    placement "decoder"   z -> sparse layer -> hidden
    placement "code"      z -> sparse layer -> another z -> hidden
    placement "encoder"   features -> sparse layer -> mean, log variance

"Fundamental Limits of Neural Network Sparsification" (arXiv 2603.18056) publishes neither layers
nor losses, only the width that follows from "500 to 50 active neurons" and "90 % reduction". So
this model is declared by us: the body follows Burgess et al. (arXiv 1804.03599: four convolutions
of kernel 4, stride 2, and a mirrored decoder) and disentanglement_lib (twice the channels in the
deeper half; hidden width 256, 10 latents, Bernoulli loss, beta = 1). The base width is 16 instead
of their 32, so that fifty epochs take minutes on a laptop's processor. Weights start after He et
al. (arXiv 1502.01852) and the output at the data's mean brightness: with torch's defaults the
posterior collapses in the first steps and the loss stays at that of the mean image.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DeadNeuronCounter
from ..ops.exported import exported
from .bottleneck import BottleneckOutput, SparseBottleneck

PLACEMENTS = ("decoder", "code", "encoder")
# Four convolutions halve the side four times.
SHRINKING = 16


@exported("sparsekern.models.vae_sae.VAESAEOutput")
class VAESAEOutput(NamedTuple):
    """What a forward pass gives, for a batch of B images."""

    logits: Tensor
    """Bernoulli logits of the pixels, [B, C, side, side]."""
    mean: Tensor
    """Posterior mean, [B, Z]."""
    log_variance: Tensor
    """Posterior log variance, [B, Z]."""
    sparse: BottleneckOutput
    """What went through the sparse layer."""

    @property
    def values(self) -> Tensor:
        """Activations of the selected units, [B, k]; of all, [B, N], where indices is None."""
        return self.sparse.values

    @property
    def indices(self) -> Tensor | None:
        """Which units these are, int64 [B, k]; None for all, in order."""
        return self.sparse.indices


@exported("sparsekern.models.vae_sae.VAESAELoss")
class VAESAELoss(NamedTuple):
    """Scalars in nats per image, averaged over the batch."""

    total: Tensor
    """reconstruction + beta * kl."""
    reconstruction: Tensor
    """Bernoulli cross entropy, summed over the pixels."""
    kl: Tensor
    """KL(q(z|x) || N(0, 1)), summed over the latents."""


class VAESAE(nn.Module):
    """VAE with a sparse layer.

    Args:
        channels: C, colour channels of the images.
        latents: Z, width of the VAE's code.
        units: N, width of the sparse layer.
        k: active units per image, 1..N; change it during training through :attr:`k`.
        hidden: width of the dense layers.
        width: channels of the outer convolutions; the inner ones have twice as many.
        mean_pixel: mean of the training images' pixels, inside 0..1.
        side: of the images, a multiple of 16.
        placement: of the sparse layer: "decoder", "code" or "encoder", see the module.
        sparsifier: see :class:`SparseBottleneck`.
        standardize: see :class:`SparseBottleneck`.
        tied: see :class:`SparseBottleneck`; needs placement "code".

    Raises:
        ValueError: an argument is out of its range.

    In training mode each forward pass tells :attr:`activity` which units fired.

    Example:
        >>> import torch
        >>> model = VAESAE(units=500, k=50)
        >>> output = model(torch.rand(2, 1, 64, 64))
        >>> output.logits.shape, output.indices.shape
        (torch.Size([2, 1, 64, 64]), torch.Size([2, 50]))
    """

    def __init__(
        self,
        channels: int = 1,
        latents: int = 10,
        units: int = 500,
        k: int = 500,
        hidden: int = 256,
        width: int = 16,
        mean_pixel: float = 0.5,
        *,
        side: int = 64,
        placement: str = "decoder",
        sparsifier: str = "topk",
        standardize: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        op = "VAESAE"
        if not 0 < mean_pixel < 1:
            raise ValueError(f"{op}: mean_pixel must lie inside 0..1, got {mean_pixel}")
        if side < SHRINKING or side % SHRINKING:
            raise ValueError(f"{op}: side must be a multiple of {SHRINKING}, got {side}")
        if placement not in PLACEMENTS:
            known = ", ".join(PLACEMENTS)
            raise ValueError(f"{op}: placement must be one of {known}, got {placement!r}")
        if tied and placement != "code":
            raise ValueError(
                f"{op}: tied needs placement 'code', whose sparse layer has as many outputs as "
                f"inputs, got {placement!r}"
            )
        self.placement = placement
        sizes = (channels, width, width, 2 * width, 2 * width)
        small = side // SHRINKING
        flat = sizes[-1] * small**2
        inputs, outputs = {
            "decoder": (latents, hidden),
            "code": (latents, latents),
            "encoder": (hidden, 2 * latents),
        }[placement]
        self.encoder = nn.Sequential(
            *_convolutions(nn.Conv2d, sizes),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.ReLU(),
        )
        self.bottleneck = SparseBottleneck(
            inputs, units, outputs, k, sparsifier=sparsifier, standardize=standardize, tied=tied
        )
        plain = nn.Identity()
        self.to_posterior = plain if placement == "encoder" else nn.Linear(hidden, 2 * latents)
        self.from_code = plain if placement == "decoder" else nn.Linear(latents, hidden)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Linear(hidden, flat),
            nn.ReLU(),
            nn.Unflatten(1, (sizes[-1], small, small)),
            *_convolutions(nn.ConvTranspose2d, sizes[::-1]),
        )
        self._initialize(mean_pixel)

    @torch.no_grad()
    def _initialize(self, mean_pixel: float) -> None:
        """Draw weights that keep the signal's variance: std^2 = gain / fan-in."""
        linear_outputs = (self.to_posterior, self.decoder[-1])
        logit = math.log(mean_pixel / (1 - mean_pixel))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                if isinstance(layer, nn.ConvTranspose2d):
                    # A pixel of the output sees 2 x 2 of the 4 x 4 taps of each input channel.
                    fan_in = 4 * layer.in_channels
                # A ReLU after the layer halves the second moment.
                gain = 1 if layer in linear_outputs else 2
                nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in))
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, logit if layer is self.decoder[-1] else 0)
        self.bottleneck.reset_parameters(gain=2 if self.placement == "decoder" else 1)

    @property
    def k(self) -> int:
        """Active units per image."""
        return self.bottleneck.k

    @k.setter
    def k(self, value: int) -> None:
        self.bottleneck.k = value

    @property
    def units(self) -> int:
        """N."""
        return self.bottleneck.units

    @property
    def activity(self) -> DeadNeuronCounter:
        """Training rows since each unit last fired."""
        return self.bottleneck.activity

    def forward(self, images: Tensor, *, sample: bool | None = None) -> VAESAEOutput:
        """Encode, sparsify and decode.

        Args:
            images: [B, C, side, side] in 0..1, of the parameters' dtype.
            sample: draw z from the posterior with torch's generator, or use its mean; by default
                draws in training mode only.
        """
        features = self.encoder(images)
        sparse = None
        if self.placement == "encoder":
            sparse = self.bottleneck(features)
            features = sparse.output
        mean, log_variance = self.to_posterior(features).chunk(2, dim=1)
        z = mean
        if self.training if sample is None else sample:
            z = reparameterize(mean, log_variance)
        if sparse is None:
            sparse = self.bottleneck(z)
            z = sparse.output
        logits = self.decoder(self.from_code(z))
        return VAESAEOutput(logits, mean, log_variance, sparse)

    def decode(self, z: Tensor) -> Tensor:
        """Compute pixel logits [B, C, side, side] of z [B, Z]."""
        if self.placement != "encoder":
            z = self.bottleneck(z).output
        logits: Tensor = self.decoder(self.from_code(z))
        return logits


def reparameterize(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Draw from N(mean, exp(log_variance)), differentiable in both, of shape [B, Z].

    The noise is drawn in float32, so that every dtype sees the same one.
    """
    noise = torch.randn(mean.shape, dtype=torch.float32, device=mean.device).to(mean.dtype)
    return mean + noise * torch.exp(0.5 * log_variance)


def vae_sae_loss(output: VAESAEOutput, images: Tensor, beta: float = 1.0) -> VAESAELoss:
    """Compute the beta-VAE loss (Higgins et al. 2017) with a Bernoulli likelihood.

        reconstruction = -log p(x|z) = sum over pixels of softplus(logit) - x * logit
        kl = 1/2 sum over latents of mean^2 + exp(log_variance) - 1 - log_variance

    Args:
        output: of :class:`VAESAE` for these images.
        images: [B, C, side, side] in 0..1.
        beta: weight of the divergence.
    """
    rows = len(images)
    pixels = F.binary_cross_entropy_with_logits(output.logits, images, reduction="sum") / rows
    mean, log_variance = output.mean, output.log_variance
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / rows
    return VAESAELoss(pixels + beta * kl, pixels, kl)


def _convolutions(kind: type[nn.Module], sizes: tuple[int, ...]) -> list[nn.Module]:
    """Make layers that halve (or, transposed, double) the side each, with ReLUs between."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [kind(inner, outer, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return layers[:-1]
