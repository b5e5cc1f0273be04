"""The VAE-SAE hybrid: a convolutional VAE whose decoder reads its latents through a sparse layer.

    images -> convolutions -> mean, log variance of z ~ N(mean, variance)          [Z = 10]
    z -> linear -> 500 units -> TopK -> ReLU = codes                               [N = 500, K = k]
    codes -> sparse dictionary -> ReLU -> linear -> transposed convolutions -> Bernoulli logits

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

from ..nn import DeadNeuronCounter, TopK
from ..ops.sparse_matmul import sparse_matmul
from ..ops.topk import codes_to_dense

SIDE = 64
# Above this share of active units a dense product costs less than picking rows of the dictionary.
DENSE_SHARE = 0.25


class VAESAEOutput(NamedTuple):
    """What a forward pass gives, for a batch of B images."""

    logits: Tensor
    """Bernoulli logits of the pixels, [B, C, 64, 64]."""
    mean: Tensor
    """Posterior mean, [B, Z]."""
    log_variance: Tensor
    """Posterior log variance, [B, Z]."""
    values: Tensor
    """Activations of the selected units after ReLU, [B, k]."""
    indices: Tensor
    """Which units these are, int64 [B, k]."""


class VAESAELoss(NamedTuple):
    """Scalars in nats per image, averaged over the batch."""

    total: Tensor
    """reconstruction + beta * kl."""
    reconstruction: Tensor
    """Bernoulli cross entropy, summed over the pixels."""
    kl: Tensor
    """KL(q(z|x) || N(0, 1)), summed over the latents."""


class VAESAE(nn.Module):
    """VAE with a sparse layer between its latents and its decoder.

    Args:
        channels: C, colour channels of the images.
        latents: Z, width of the VAE's code.
        units: N, width of the sparse layer.
        k: active units per image, 1..N; change it during training through :attr:`k`.
        hidden: width of the dense layers.
        width: channels of the outer convolutions; the inner ones have twice as many.
        mean_pixel: mean of the training images' pixels, inside 0..1.

    Raises:
        ValueError: k or mean_pixel is out of its range.

    In training mode each forward pass tells :attr:`activity` which units fired; so do direct calls
    of :meth:`codes`.

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
    ) -> None:
        super().__init__()
        if not 0 < mean_pixel < 1:
            raise ValueError(f"VAESAE: mean_pixel must lie inside 0..1, got {mean_pixel}")
        sizes = (channels, width, width, 2 * width, 2 * width)
        flat = sizes[-1] * (SIDE // 16) ** 2
        self.encoder = nn.Sequential(
            *_convolutions(nn.Conv2d, sizes),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * latents),
        )
        self.to_units = nn.Linear(latents, units)
        self.sparsity = TopK(k, counter=DeadNeuronCounter(units))
        self.dictionary = nn.Parameter(torch.empty(units, hidden))
        self.dictionary_bias = nn.Parameter(torch.zeros(hidden))
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Linear(hidden, flat),
            nn.ReLU(),
            nn.Unflatten(1, (sizes[-1], SIDE // 16, SIDE // 16)),
            *_convolutions(nn.ConvTranspose2d, sizes[::-1]),
        )
        self._initialize(mean_pixel)

    @torch.no_grad()
    def _initialize(self, mean_pixel: float) -> None:
        """Keeps the variance of the signal from layer to layer: std^2 = gain / fan-in."""
        linear_outputs = (self.encoder[-1], self.decoder[-1])
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
        nn.init.normal_(self.dictionary, std=math.sqrt(2 / len(self.dictionary)))

    @property
    def k(self) -> int:
        """Active units per image."""
        return self.sparsity.k

    @k.setter
    def k(self, value: int) -> None:
        self.sparsity.k = value

    @property
    def activity(self) -> DeadNeuronCounter:
        """Training rows since each unit last fired."""
        counter = self.sparsity.counter
        if counter is None:
            raise RuntimeError("VAESAE: the counter of the sparse layer was taken away")
        return counter

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance, [B, Z] each, of images in 0..1 [B, C, 64, 64]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def codes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the sparse layer, values [B, k] and indices int64 [B, k], for z [B, Z]."""
        return self.sparsity.codes(self.to_units(z))

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Pixel logits [B, C, 64, 64] of codes [B, k]."""
        units = len(self.dictionary)
        if values.shape[-1] > DENSE_SHARE * units:
            hidden = codes_to_dense(values, indices, units) @ self.dictionary + self.dictionary_bias
        else:
            hidden = sparse_matmul(values, indices, self.dictionary, self.dictionary_bias)
        return self.decoder(hidden)

    def forward(self, images: Tensor, *, sample: bool | None = None) -> VAESAEOutput:
        """Encodes, sparsifies and decodes.

        Args:
            images: [B, C, 64, 64] in 0..1, of the parameters' dtype.
            sample: draw z from the posterior with torch's generator, or use its mean; by default
                draws in training mode only.
        """
        mean, log_variance = self.encode(images)
        z = mean
        if self.training if sample is None else sample:
            z = reparameterize(mean, log_variance)
        values, indices = self.codes(z)
        return VAESAEOutput(self.decode(values, indices), mean, log_variance, values, indices)


def reparameterize(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw from N(mean, exp(log_variance)), differentiable in both, of shape [B, Z].

    The noise is drawn in float32, so that every dtype sees the same one.
    """
    noise = torch.randn(mean.shape, dtype=torch.float32, device=mean.device).to(mean.dtype)
    return mean + noise * torch.exp(0.5 * log_variance)


def vae_sae_loss(output: VAESAEOutput, images: Tensor, beta: float = 1.0) -> VAESAELoss:
    """The beta-VAE loss (Higgins et al. 2017) with a Bernoulli likelihood.

        reconstruction = -log p(x|z) = sum over pixels of softplus(logit) - x * logit
        kl = 1/2 sum over latents of mean^2 + exp(log_variance) - 1 - log_variance

    Args:
        output: of :class:`VAESAE` for these images.
        images: [B, C, 64, 64] in 0..1.
        beta: weight of the divergence.
    """
    rows = len(images)
    pixels = F.binary_cross_entropy_with_logits(output.logits, images, reduction="sum") / rows
    mean, log_variance = output.mean, output.log_variance
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / rows
    return VAESAELoss(pixels + beta * kl, pixels, kl)


def _convolutions(kind: type[nn.Module], sizes: tuple[int, ...]) -> list[nn.Module]:
    """Layers that halve (or, transposed, double) the side each, with a ReLU between two."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [kind(inner, outer, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return layers[:-1]
