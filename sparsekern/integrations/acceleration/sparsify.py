"""sparsify (eai-sparsify): SparseCoder with TopK and GroupMax, AuxK and Multi-TopK.

sparsify gives the encoder no gradient of AuxK and Multi-TopK, and gives one to selected latents
whose activation ReLU has set to zero. Both are made right here; match_upstream keeps them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...nn.scores import Scores
from ...ops.checks import autocasting
from ...ops.codes import Codes
from ...ops.sparse_matmul import sparse_matmul
from .encoders import late_scores, runs_on_codes
from .replacement import Methods, Replacement

_CODER = "sparsify.sparse_coder"


class SparseCoder(Methods):
    """sparsify.SparseCoder."""

    __slots__ = ()

    def encode(self, x: Tensor) -> Any:
        """Return top_acts, top_indices, and pre_acts, which are late."""
        if not runs_on_codes(x, self.encoder) or not _is_known(self.cfg.activation):
            return super().encode(x)
        bias = None if self.cfg.transcode else self.b_dec
        layer = self.encoder
        scores = Scores(x, layer.weight, layer.bias, bias, None)
        groups = self.cfg.k if self.cfg.activation == "groupmax" else 1
        if not self.match_upstream:
            values, indices, _ = scores.topk(self.cfg.k, groups=groups)
            return _part("EncoderOutput")(values, indices, late_scores(scores, relu=True))
        values, indices, _ = scores.topk(self.cfg.k, groups=groups, relu=False)
        values = values + (values.relu() - values).detach()  # ReLU without its gradient
        pre_acts = late_scores(scores.detached(), relu=True)
        return _part("EncoderOutput")(values, indices, pre_acts)

    def encode_sparse(self, x: Tensor) -> Codes:
        """Return the codes of x: values [..., k] and indices int64 [..., k]."""
        return Codes(*self.encode(x)[:2])

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Return the reconstruction of codes."""
        return self._decoded(top_acts, top_indices, self.b_dec)

    def _decoded(self, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        if self.W_dec is None:
            raise ValueError("SparseCoder: W_dec must be there for decoding, got decoder=False")
        if not autocasting(values):
            values = values.to(self.dtype)
        product: Tensor = sparse_matmul(values, indices, self.W_dec, bias)
        return product

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> Any:
        """Return what sparsify does: reconstruction, codes, FVU, AuxK and Multi-TopK losses."""
        if not runs_on_codes(x, self.encoder) or not _is_known(self.cfg.activation):
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        with torch.autocast(
            "cuda", dtype=torch.bfloat16, enabled=x.is_cuda and torch.cuda.is_bf16_supported()
        ):
            return self._losses(x, x if y is None else y, dead_mask, total_variance)

    def _losses(
        self, x: Tensor, y: Tensor, dead_mask: Tensor | None, total_variance: Tensor | None
    ) -> Any:
        top_acts, top_indices, pre_acts = self.encode(x)
        sae_out = self.decode(top_acts, top_indices)
        if self.W_skip is not None:
            sae_out = sae_out + x.to(self.dtype) @ self.W_skip.mT
        e = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        auxk_loss = multi_topk_fvu = sae_out.new_tensor(0.0)
        dead = 0 if dead_mask is None else int(dead_mask.sum())
        if dead > 0:
            most = y.shape[-1] // 2
            scores = torch.where(dead_mask[None], pre_acts, -torch.inf)  # type: ignore[index]
            codes = scores.topk(min(most, dead), sorted=False)
            error = self._decoded(*codes, None) - e.detach()
            auxk_loss = min(dead / most, 1.0) * error.pow(2).sum() / total_variance
        fvu = e.pow(2).sum() / total_variance
        if self.cfg.multi_topk:
            top_acts, top_indices = pre_acts.topk(4 * self.cfg.k, sorted=False)
            sae_out = self.decode(top_acts, top_indices)
            multi_topk_fvu = (sae_out - y).pow(2).sum() / total_variance
        return _part("ForwardOutput")(
            sae_out, top_acts, top_indices, fvu, auxk_loss, multi_topk_fvu
        )


def _is_known(activation: str) -> bool:
    return activation in ("topk", "groupmax")


def _part(name: str) -> Any:
    """Return a class of sparsify, which the model's class has imported."""
    return getattr(sys.modules[_CODER], name)


REPLACEMENTS = (
    Replacement(
        _CODER, "SparseCoder", SparseCoder, ("encode", "forward"),
        "encoder, selection, decoder, AuxK and Multi-TopK",
    ),
)  # fmt: skip
