"""overcomplete: TopKSAE. An encoder other than a single linear layer stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.scores import Scores
from ...ops.codes import Codes
from ...ops.topk import topk
from .encoders import (
    as_returned,
    codes_of,
    found_codes,
    late_inside,
    late_scores,
    runs_on_codes,
    topk_activations,
)
from .late import LateCodes, dense, late_tensor
from .replacement import Methods, Replacement


class TopKSAE(Methods):
    """overcomplete.sae.TopKSAE.

    In training mode the forward pass returns pre-codes and codes that are late (late.py), so that a
    criterion that does not look at them never makes them.
    """

    __slots__ = ()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pre-codes and codes, dense."""
        if not runs_on_codes(x, self.encoder):
            return super().encode(x)
        layer = _only_layer(self.encoder)
        if layer is None or x.dim() != 2:
            pre_codes, activations = self.encoder(x)
            values, indices = topk(activations, self.top_k, sorted=False)
            codes = LateCodes(values, indices, activations.shape[-1])
            return pre_codes, as_returned(late_tensor(codes))
        scores = Scores(x, layer.weight, layer.bias, None, None)
        codes = topk_activations(scores, self.top_k)
        return as_returned(late_scores(scores)), as_returned(late_tensor(codes))

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction of codes z."""
        return super().decode(found_codes(z))

    def encode_sparse(self, x: Tensor) -> Codes:
        """Return the codes of x: values [B, k] and indices int64 [B, k]."""
        with late_inside():
            return codes_of(self.encode(x)[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pre-codes, codes and reconstruction of x; the first two are late in training."""
        with late_inside():
            pre_codes, codes, reconstruction = super().forward(x)
        if not self.training:
            pre_codes, codes = dense(pre_codes), dense(codes)
        return pre_codes, codes, reconstruction


def _only_layer(encoder: nn.Module) -> Any:
    """Return the layer of an encoder that is one linear layer and ReLU; None for others."""
    if type(encoder).__name__ != "MLPEncoder" or len(encoder.mlp_blocks):  # type: ignore[arg-type]
        return None
    layer, normalization = encoder.final_block  # type: ignore[misc]
    plain = type(normalization) is nn.Identity and type(encoder.final_activation) is nn.ReLU
    if type(layer) is not nn.Linear or not plain:
        return None
    return layer if runs_on_codes(layer.weight, *encoder.modules()) else None


REPLACEMENTS = (
    Replacement(
        "overcomplete.sae.topk_sae", "TopKSAE", TopKSAE, ("encode", "forward"),
        "encoder, selection and decoder",
    ),
)  # fmt: skip
