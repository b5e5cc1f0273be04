"""A stand-in for OpenAI's `sparse_autoencoder.model`, which no package index has.

It has the names, parameters, buffers and results that the documentation and the checkpoints show:
an encoder without bias beside latent_bias and pre_bias, TopK with a postact_fn, and a count of the
steps since each latent was last above zero.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "sparse_autoencoder.model"


class TopK(nn.Module):
    def __init__(self, k, postact_fn=None):
        super().__init__()
        self.k = k
        self.postact_fn = nn.ReLU() if postact_fn is None else postact_fn

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.topk(x, k=self.k, dim=-1)
        latents = torch.zeros_like(x)
        latents.scatter_(-1, kept.indices, self.postact_fn(kept.values))
        return latents


class Autoencoder(nn.Module):
    def __init__(self, n_latents, n_inputs, activation=None, normalize=False):
        super().__init__()
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs))
        self.encoder = nn.Linear(n_inputs, n_latents, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        self.activation = nn.ReLU() if activation is None else activation
        self.decoder = nn.Linear(n_latents, n_inputs, bias=False)
        self.normalize = normalize
        self.register_buffer("stats_last_nonzero", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(n_latents))
        self.register_buffer("latents_mean_square", torch.zeros(n_latents))

    def preprocess(self, x):
        if not self.normalize:
            return x, {}
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = centred.std(dim=-1, keepdim=True)
        return centred / (std + 1e-5), {"mu": mean, "std": std}

    def encode_pre_act(self, x, latent_slice=slice(None)):
        rows = self.encoder.weight[latent_slice]
        return F.linear(x - self.pre_bias, rows, self.latent_bias[latent_slice])

    def encode(self, x):
        x, info = self.preprocess(x)
        return self.activation(self.encode_pre_act(x)), info

    def decode(self, latents, info=None):
        out = self.decoder(latents) + self.pre_bias
        return out * info["std"] + info["mu"] if self.normalize else out

    def forward(self, x):
        x, info = self.preprocess(x)
        scores = self.encode_pre_act(x)
        latents = self.activation(scores)
        out = self.decode(latents, info)
        self.stats_last_nonzero *= (latents == 0).all(dim=0).long()
        self.stats_last_nonzero += 1
        return scores, latents, out


def install(monkeypatch) -> ModuleType:
    """Let the classes above be those of the library."""
    package, module = ModuleType("sparse_autoencoder"), ModuleType(NAME)
    for own in (TopK, Autoencoder):
        monkeypatch.setattr(own, "__module__", NAME)
        setattr(module, own.__name__, own)
    package.model = module
    monkeypatch.setitem(sys.modules, "sparse_autoencoder", package)
    monkeypatch.setitem(sys.modules, NAME, module)
    return module
