"""The codes of a sparse autoencoder, for each of its activations.

TopK keeps a fixed number of latents in each row. For the others the number differs from row to row,
and the latents that may be active are searched (see nn/scores.py). Whether codes or dense scores
are used depends on the input alone, and so does what is recorded for the backward pass (gradient
checkpointing compares it). Where sizes cannot depend on data (compiled or traced code, CUDA graphs,
vmap) the dense expression is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import BatchTopK, JumpReLU, TopK
from ..nn.hooks import has_hooks
from ..nn.scores import Scores, Width, select_above, select_largest_of_batch, sizes_are_fixed
from ..nn.wrappers import is_cut
from ..ops.codes import Transposition
from ..ops.jumprelu import at_most, jumprelu, step
from ..ops.linear_at import vector_at
from ..ops.transpose_codes import transpose_codes


class Encoding(NamedTuple):
    """Codes of an activation, and its sparsity.

    Attributes:
        values: [..., w], zeros where a row has fewer active latents.
        indices: [..., w].
        transposition: of the indices, if it is known.
        penalty: 0-d, sum of the activation's sparsity loss over the rows.
        dense: w = N and the indices are 0..N-1.
    """

    values: Tensor
    indices: Tensor
    transposition: Transposition | None
    penalty: Tensor
    dense: bool = False


def encode(layer: nn.Module, scores: Scores, width: Width) -> Encoding:
    """Return the codes of an activation layer, in the layer's training or evaluation mode.

    A layer with hooks is called with all scores, and its output is the code: hooks get, and may
    replace, its dense input and output.
    """
    if has_hooks(layer):
        return _call(layer, scores.all())
    encoder = next(_ENCODERS[t] for t in type(layer).__mro__ if t in _ENCODERS)
    return encoder(layer, scores, width)


def _call(layer: nn.Module, scores: Tensor) -> Encoding:
    """Call a layer with all scores; return its dense codes and penalty."""
    encoding = _dense(layer(scores))
    if isinstance(layer, JumpReLU):
        return encoding._replace(
            penalty=_sum_in_float32(step(scores, layer.threshold, *layer.band))
        )
    if isinstance(layer, nn.ReLU):
        return encoding._replace(penalty=_sum_in_float32(encoding.values))
    return encoding


def check_activation(layer: nn.Module, latents: int) -> None:
    """Check that `encode` supports an activation, and that it fits the number of latents.

    Raises:
        TypeError: another layer.
        ValueError: one with options that codes cannot express, or of another width.
    """
    op = "SparseAutoencoder"
    if type(layer) not in _ENCODERS:
        known = ", ".join(layer_type.__name__ for layer_type in _ENCODERS)
        raise TypeError(f"{op}: activation must be one of {known}, got {type(layer).__name__}")
    if isinstance(layer, TopK) and not layer.is_plain:
        raise ValueError(f"{op}: activation must have ReLU and no abs, got {layer}")
    if isinstance(layer, (TopK, BatchTopK)):
        if layer.counter is not None:
            raise ValueError(f"{op}: activation must have no counter, since the model has one")
        if isinstance(layer, BatchTopK) and layer.distributed:
            raise ValueError(
                f"{op}: activation must not be distributed, got {layer}: sparsekern.distributed's "
                "ShardedAutoencoder, on a mesh with a dimension 'data', selects in all rows"
            )
        if layer.k > latents:
            raise ValueError(f"{op}: k must be at most {latents}, the latents, got {layer.k}")
    if isinstance(layer, JumpReLU) and layer.log_threshold.shape != (latents,):
        raise ValueError(
            f"{op}: activation must have {latents} thresholds, one a latent, "
            f"got {list(layer.log_threshold.shape)}"
        )


def _no_penalty(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


def _topk(layer: TopK, scores: Scores, _: Width) -> Encoding:
    return Encoding(*scores.topk(layer.k, groups=layer.groups), _no_penalty(scores.x))


def _relu(_: nn.ReLU, scores: Scores, width: Width) -> Encoding:
    selected = select_above(scores, 0.0, width)
    if isinstance(selected, Tensor):
        values = selected.relu()
        return _dense(values)._replace(penalty=_sum_in_float32(values))
    values = scores.at(*selected).relu()
    return Encoding(values, *selected, _sum_in_float32(values))


def _jumprelu(layer: JumpReLU, scores: Scores, width: Width) -> Encoding:
    # The pseudo-derivative reaches half a bandwidth below the threshold.
    theta, (bandwidth, relative) = layer.threshold, layer.band
    if is_cut(theta):
        raise RuntimeError(
            "SparseAutoencoder: the activation must not be given to fully_shard by itself, since "
            "its parameters are used without a call of it: give fully_shard the model alone"
        )
    lowest = theta.detach() * (1 - bandwidth / 2) if relative else theta.detach() - bandwidth / 2
    selected = select_above(scores, 0.0, width, lowest)
    if isinstance(selected, Tensor):
        penalty = _sum_in_float32(step(selected, theta, bandwidth, relative))
        return _dense(layer(selected))._replace(penalty=penalty)
    z, thresholds = scores.at(*selected), vector_at(theta, *selected)
    values = jumprelu(z, thresholds, bandwidth, relative)
    return Encoding(values, *selected, _sum_in_float32(step(z, thresholds, bandwidth, relative)))


def _batch_topk(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if layer.training:
        return _batch_topk_in_training(layer, scores, width)
    threshold = layer.known_threshold()
    selected = select_above(scores, threshold, width)
    if isinstance(selected, Tensor):
        return _dense(layer(selected))
    z = scores.at(*selected)
    return Encoding(torch.where(at_most(z, threshold), 0, z), *selected, _no_penalty(scores.x))


def _batch_topk_in_training(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if sizes_are_fixed(scores.x):
        return _dense(layer(scores.all()))
    unscaled = scores.unscaled() if width.favours_dense(scores.latents) else None
    selected = select_largest_of_batch(layer.k, scores, width, unscaled)
    if selected is None:
        return _dense(layer(scores.all(unscaled)))
    found, indices, kept = selected
    layer.observe(found[kept])
    transposition = transpose_codes(indices, scores.latents)
    values = torch.where(kept, scores.at(indices, transposition).relu(), 0)
    return Encoding(values, indices, transposition, _no_penalty(scores.x))


_ENCODERS: dict[type[nn.Module], Callable[..., Encoding]] = {
    TopK: _topk,
    BatchTopK: _batch_topk,
    JumpReLU: _jumprelu,
    nn.ReLU: _relu,
}


def _sum_in_float32(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _dense(values: Tensor) -> Encoding:
    indices = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    return Encoding(values, indices, None, _no_penalty(values), dense=True)
