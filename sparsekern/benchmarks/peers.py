"""Sparse autoencoders of other packages, with the weights of ours; every package is optional.

A step is what the package's own training does up to the optimizer: its public forward pass, which
returns its loss, and the gradients of all its parameters. Auxiliary losses see no dead latents.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ..models import SparseAutoencoder
from ..sae.statistics import total_variance

Tensor = torch.Tensor


@dataclass(frozen=True)
class Peer:
    """A sparse autoencoder of another package.

    loss: the package's loss of one batch. parameters: of which it takes gradients. unit:
    sum |x - reconstruction|^2 that makes a loss of 1.
    """

    loss: Callable[[], Tensor]
    parameters: Sequence[Tensor]
    unit: float


def _sparsify(model: SparseAutoencoder, x: Tensor) -> Peer:
    """SparseCoder(d, SparseCoderConfig(num_latents, k)); coder(x).fvu, as its Trainer does."""
    import sparsify

    config = sparsify.SparseCoderConfig(num_latents=len(model.dictionary), k=model.k)
    coder = sparsify.SparseCoder(x.shape[1], config, device=x.device)
    linear = coder.encoder
    _fill(model, linear.weight, linear.bias, coder.W_dec, coder.b_dec)
    return Peer(lambda: coder(x).fvu, list(coder.parameters()), total_variance(x).item())


def _sae_lens(model: SparseAutoencoder, x: Tensor) -> Peer:
    """TopKTrainingSAE(TopKTrainingSAEConfig(d_in, d_sae, k)), all else at its default.

    Its loss is sae.training_forward_pass(TrainStepInput(...)).loss, as its SAETrainer does.
    """
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    n, d = model.dictionary.shape
    config = sae_lens.TopKTrainingSAEConfig(d_in=d, d_sae=n, k=model.k, device=str(x.device))
    sae = sae_lens.TopKTrainingSAE(config)
    _fill(model, sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec)
    batch = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    return Peer(lambda: sae.training_forward_pass(batch).loss, list(sae.parameters()), len(x))


def _dictionary_learning(model: SparseAutoencoder, x: Tensor) -> Peer:
    """TopKTrainer(...) with its AutoEncoderTopK; trainer.loss(x, step=0), as its update() does."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    n, d = model.dictionary.shape
    trainer = TopKTrainer(
        steps=10_000, activation_dim=d, dict_size=n, k=model.k, layer=0, lm_name="none",
        device=str(x.device),
    )  # fmt: skip
    coder = trainer.ae
    _fill(model, coder.encoder.weight, coder.encoder.bias, coder.decoder.weight.t(), coder.b_dec)
    return Peer(lambda: trainer.loss(x, step=0), list(coder.parameters()), len(x))


@torch.no_grad()
def _fill(model: SparseAutoencoder, *theirs: Tensor) -> None:
    """Write our weights into theirs, whose memory layout stays as it is."""
    ours = (model.encoder, model.encoder_bias, model.dictionary, model.decoder_bias)
    for parameter, value in zip(theirs, ours, strict=True):
        parameter.copy_(value)


# By the names under which pip knows them: what to import first, and what builds the peer.
_KNOWN = {
    "eai-sparsify": ("sparsify", _sparsify),
    "sae-lens": ("sae_lens", _sae_lens),
    "dictionary-learning": ("dictionary_learning.trainers.top_k", _dictionary_learning),
}
NAMES = tuple(_KNOWN)


def build(name: str, model: SparseAutoencoder, x: Tensor) -> Peer:
    """Make the peer of that name with the weights of our model, for a batch x [B, d]."""
    return _KNOWN[name][1](model, x)


@functools.cache
def trouble(name: str) -> str | None:
    """Why a peer cannot be used here; None when it can, or when the name is not one of NAMES."""
    if name not in _KNOWN:
        return None
    try:
        version(name)
    except PackageNotFoundError:
        return "not installed (pip install '.[peers]')"
    # eai-sparsify decides when it is imported, and its Triton kernels take no CPU tensors.
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            __import__(_KNOWN[name][0])
    except Exception as error:  # whatever its own dependencies raise
        return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def release(name: str) -> str | None:
    """Return the installed version of a peer; None for what is not a package."""
    return version(name) if name in _KNOWN else None
