"""SAELens: TopK, BatchTopK, matryoshka and (for inference) JumpReLU autoencoders; TopK layers.

The activations that the training pass hands to the losses and to the trainer are late tensors
(late.py), so SAELens' own decoder, AuxK and counts run on codes. A hook on the pre- or
post-activations gets a dense tensor, since SAELens' own code then runs.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...nn.scores import Scores
from ...ops.batch_topk import batch_topk
from ...ops.codes import Codes
from ...ops.topk import mask_with_codes
from ..sae_lens import to_sparse_coo
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
from .late import LateCodes, LateTensor, content_of, late_tensor
from .norms import normed
from .replacement import Methods, Replacement, class_of

_TOPK, _BATCH_TOPK = "sae_lens.saes.topk_sae", "sae_lens.saes.batchtopk_sae"


class _Autoencoder(EncodesDense):
    """What all of them have in common."""

    __slots__ = ()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x, by SAELens' own forward pass."""
        with late_inside():
            return super().forward(x)


class JumpReLUSAE(_Autoencoder):
    """sae_lens.JumpReLUSAE, as which BatchTopK autoencoders are saved."""

    __slots__ = ()

    def encode(self, x: Tensor) -> Tensor:
        """Return the activations of x, dense."""
        hooked = (self.hook_sae_acts_pre, self.hook_sae_acts_post, self.activation_fn)
        if type(self.activation_fn) is not nn.ReLU or not runs_on_codes(x, *hooked):
            return super().encode(x)
        scores = Scores(self.process_sae_in(x), self.W_enc.t(), self.b_enc, None, None)
        return as_returned(threshold_activations(self, scores, self.threshold))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction of activations."""
        return super().decode(found_codes(feature_acts))


class _TopKAutoencoder(_Autoencoder):
    """What training and inference of TopK have in common."""

    __slots__ = ()

    def _late(self, x: Tensor) -> tuple[LateTensor, Scores] | None:
        """Return activations and scores; None where SAELens' own code has to run."""
        activation = self.activation_fn
        kind = class_of(activation) if isinstance(activation, nn.Module) else None
        hooked = (self.hook_sae_acts_pre, self.hook_sae_acts_post, activation)
        if kind not in (_LAYER.upstream(), _BATCH_LAYER.upstream()):
            return None
        if not runs_on_codes(x, *hooked):
            return None
        decoder = normed(self.W_dec) if self.cfg.rescale_acts_by_decoder_norm else None
        norms = None if decoder is None else decoder.norms
        scores = Scores(self.process_sae_in(x), self.W_enc.t(), self.b_enc, None, norms)
        if kind is _LAYER.upstream():
            codes = topk_activations(scores, activation.k)
        elif (found := batch_topk_activations(self, scores, activation.k)) is not None:
            codes = found
        else:
            return None
        activations = late_tensor(codes)
        activations.decoder = decoder
        return activations, scores

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction of activations; late ones come with the norms of W_dec."""
        content, decoder = content_of(feature_acts), getattr(feature_acts, "decoder", None)
        if not isinstance(content, LateCodes) or decoder is None:
            sparse = feature_acts.is_sparse
            return super().decode(feature_acts if sparse else found_codes(feature_acts))
        feature_acts.decoder = None  # type: ignore[attr-defined]  # it is for one product only
        out = content.scaled(1 / decoder.norms).product(decoder.dictionary) + self.b_dec
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
        return self.reshape_fn_out(out, self.d_head)


class TopKSAE(_TopKAutoencoder):
    """sae_lens.TopKSAE."""

    __slots__ = ()

    def encode(self, x: Tensor) -> Tensor:
        """Return the activations of x, dense."""
        found = self._late(x)
        if found is None:
            return super().encode(x)
        return as_returned(found[0])


class TopKTrainingSAE(_TopKAutoencoder):
    """sae_lens.TopKTrainingSAE and what is derived from it."""

    __slots__ = ()

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations of x and their scores, both late."""
        found = self._late(x)
        if found is None:
            return super().encode_with_hidden_pre(x)
        activations, scores = found
        return activations, late_scores(scores)

    def encode(self, x: Tensor) -> Tensor:
        """Return the activations of x, dense, or sparse COO with use_sparse_activations."""
        activations = super().encode(x)
        returned = as_returned(activations)
        content = content_of(activations)
        sparse = getattr(self.activation_fn, "use_sparse_activations", False)
        if sparse and isinstance(content, LateCodes) and returned is not activations:
            return to_sparse_coo(Codes(content.values, content.indices), activations.shape)
        return returned


class TopKLayer(Methods):
    """sae_lens.saes.topk_sae.TopK."""

    __slots__ = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return x with all but the k largest of each row set to zero, after ReLU."""
        if self.use_sparse_activations or not runs_on_codes(x):
            return super().forward(x)
        masked: Tensor = mask_with_codes(x, self.k, relu=True)[0]
        return masked


class BatchTopKLayer(Methods):
    """sae_lens.saes.batchtopk_sae.BatchTopK."""

    __slots__ = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return x with all but the k B largest of its B rows set to zero, after ReLU."""
        if not runs_on_codes(x) or int(self.k * x.shape[:-1].numel()) < 1:
            return super().forward(x)
        return batch_topk(x, self.k, relu=True)


_LAYER = Replacement(_TOPK, "TopK", TopKLayer, ("forward",), "selection")
_BATCH_LAYER = Replacement(_BATCH_TOPK, "BatchTopK", BatchTopKLayer, ("forward",), "selection")
REPLACEMENTS = (
    Replacement(
        _TOPK, "TopKTrainingSAE", TopKTrainingSAE,
        ("encode_with_hidden_pre", "encode", "forward"),
        "encoder, selection, decoder, losses and AuxK of a training step",
    ),
    Replacement(
        _TOPK, "TopKSAE", TopKSAE, ("encode", "forward"),
        "encoder, selection and decoder",
    ),
    Replacement(
        "sae_lens.saes.jumprelu_sae", "JumpReLUSAE", JumpReLUSAE, ("encode", "forward"),
        "encoder, selection and decoder",
    ),
    _LAYER,
    _BATCH_LAYER,
)  # fmt: skip
