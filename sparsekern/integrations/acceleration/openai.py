"""OpenAI's sparse_autoencoder: Autoencoder with TopK, and its TopK layer.

It is not on the package index and has no versions. Its classes are known by their names and by the
attributes that they have (sparse_autoencoder/model.py of June 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn.scores import Scores
from ...ops.codes import Codes
from ...ops.count_active import count_active
from ...ops.topk import mask_with_codes
from .encoders import as_returned, codes_of, found_codes, late_inside, late_scores, runs_on_codes
from .late import LateCodes, content_of, dense
from .replacement import Methods, Replacement, class_of

_MODEL = "sparse_autoencoder.model"


class Autoencoder(Methods):
    """sparse_autoencoder.model.Autoencoder.

    In training mode the forward pass returns pre-activations and latents that are late (late.py).
    """

    __slots__ = ()

    def encode_pre_act(self, x: Tensor, latent_slice: slice = slice(None)) -> Tensor:
        """Return the scores of x, dense."""
        encoder: Any = self.encoder
        known = class_of(self.activation) is _LAYER.upstream() and latent_slice == slice(None)
        if not known or not runs_on_codes(x, encoder, self.activation):
            return super().encode_pre_act(x, latent_slice)
        scores = Scores(x, encoder.weight, self.latent_bias, self.pre_bias, None)
        return as_returned(late_scores(scores))

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the latents of x, dense, and what its normalization took away."""
        with late_inside():
            latents, information = super().encode(x)
        return as_returned(latents), information

    def decode(self, latents: Tensor, info: dict[str, Any] | None = None) -> Tensor:
        """Return the reconstruction of latents."""
        return super().decode(found_codes(latents), info)

    def encode_sparse(self, x: Tensor) -> Codes:
        """Return the codes of x: values [..., k] and indices int64 [..., k]."""
        with late_inside():
            return codes_of(self.encode(x)[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pre-activations, latents and reconstruction; the first two late in training."""
        with late_inside():
            rows, information = self.preprocess(x)
            scores = self.encode_pre_act(rows)
            latents = self.activation(scores)
            reconstruction = self.decode(latents, information)
        content = content_of(latents)
        if isinstance(content, LateCodes):
            fired = count_active(content.indices, content.n, content.values.detach()) > 0
        else:
            fired = (latents.detach() != 0).any(dim=0)
        self.stats_last_nonzero *= (~fired).long()
        self.stats_last_nonzero += 1
        if not self.training:
            scores, latents = dense(scores), dense(latents)
        return scores, latents, reconstruction


class TopKLayer(Methods):
    """sparse_autoencoder.model.TopK."""

    __slots__ = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return x with all but the k largest of each row set to zero, after postact_fn."""
        if content_of(x) is not None or not runs_on_codes(x) or not self._has_relu():
            return super().forward(x)
        masked: Tensor = mask_with_codes(x, self.k, relu=True)[0]
        return masked

    def _has_relu(self) -> bool:
        post = self.postact_fn
        return type(post) is nn.ReLU or post in (torch.relu, nn.functional.relu)


_LAYER = Replacement(_MODEL, "TopK", TopKLayer, ("forward",), "selection")
REPLACEMENTS = (
    Replacement(
        _MODEL, "Autoencoder", Autoencoder, ("encode_pre_act", "encode", "forward"),
        "encoder, selection and decoder",
    ),
    _LAYER,
)  # fmt: skip
