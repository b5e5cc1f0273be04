"""dictionary_learning: AutoEncoderTopK, BatchTopKSAE and MatryoshkaBatchTopKSAE.

Its trainers ask for more than the activations (return_topk, return_active), and get late tensors
(late.py), so their losses, AuxK and thresholds run on codes. Other calls return dense tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn.scores import Scores
from ...ops.count_active import count_active
from .encoders import (
    EncodesDense,
    as_returned,
    batch_topk_activations,
    found_codes,
    late_inside,
    late_scores,
    runs_on_codes,
    threshold_activations,
    topk_activations,
)
from .late import dense, late_tensor
from .replacement import Replacement

_TRAINERS = "dictionary_learning.trainers"


class _Dictionary(EncodesDense):
    """What all of them have in common."""

    __slots__ = ()

    def decode(self, x: Tensor) -> Tensor:
        """Return the reconstruction of activations x."""
        return super().decode(found_codes(x))

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """Reconstruct x; with output_features return the activations, too, dense."""
        with late_inside():
            result = super().forward(x, output_features)
        return (result[0], dense(result[1])) if output_features else result


class AutoEncoderTopK(_Dictionary):
    """dictionary_learning.trainers.top_k.AutoEncoderTopK."""

    __slots__ = ()

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """Return the activations, dense; with return_topk late ones, codes, and late scores."""
        if (use_threshold and return_topk) or not runs_on_codes(x, self.encoder):
            return super().encode(x, return_topk, use_threshold)
        scores = Scores(x, self.encoder.weight, self.encoder.bias, self.b_dec, None)
        if use_threshold:
            return as_returned(threshold_activations(self, scores, self.threshold))
        codes = topk_activations(scores, int(self.k))
        if not return_topk:
            return as_returned(late_tensor(codes))
        late = late_scores(scores, relu=True)
        return late_tensor(codes), codes.values, codes.indices, late


class BatchTopKSAE(_Dictionary):
    """dictionary_learning.trainers.batch_top_k.BatchTopKSAE."""

    __slots__ = ()

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Return the activations, dense; with return_active late, active latents, late scores."""
        all_used = self._used() is None
        found = None
        if runs_on_codes(x, *self._encoder_modules()):
            scores = self._scores(x)
            if use_threshold and all_used and not return_active:
                return as_returned(threshold_activations(self, scores, self.threshold))
            if not use_threshold:
                found = batch_topk_activations(self, scores, int(self.k), self._used())
        if found is None:
            return super().encode(x, return_active, use_threshold)
        if not return_active:
            return as_returned(late_tensor(found))
        active = count_active(found.indices, found.n, found.values.detach()) > 0
        return late_tensor(found), active, late_scores(scores, relu=True)

    def _encoder_modules(self) -> tuple[Any, ...]:
        return (self.encoder,)

    def _scores(self, x: Tensor) -> Scores:
        return Scores(x, self.encoder.weight, self.encoder.bias, self.b_dec, None)

    def _used(self) -> int | None:
        """Return the number of latents in use, None for all."""
        return None


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """dictionary_learning.trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE."""

    __slots__ = ()

    def _encoder_modules(self) -> tuple[Any, ...]:
        return ()

    def _scores(self, x: Tensor) -> Scores:
        return Scores(x, self.W_enc.t(), self.b_enc, self.b_dec, None)

    def _used(self) -> int | None:
        end = int(self.group_indices[self.active_groups])
        return None if end == self.dict_size else end


_METHODS = ("encode", "forward")
REPLACEMENTS = (
    Replacement(
        f"{_TRAINERS}.top_k", "AutoEncoderTopK", AutoEncoderTopK, _METHODS,
        "encoder, selection, decoder, and the trainer's loss and AuxK",
    ),
    Replacement(
        f"{_TRAINERS}.batch_top_k", "BatchTopKSAE", BatchTopKSAE, _METHODS,
        "encoder, selection, decoder, and the trainer's loss and AuxK",
    ),
    Replacement(
        f"{_TRAINERS}.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", MatryoshkaBatchTopKSAE,
        _METHODS, "encoder, selection, decoder, and the trainer's losses and AuxK",
    ),
)  # fmt: skip
