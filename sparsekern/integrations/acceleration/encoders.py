"""What the encoders of the libraries have in common: scores, a selection, late activations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...nn.codes import codes_where
from ...nn.hooks import has_hooks
from ...nn.scores import (
    NARROWEST,
    Scores,
    Width,
    select_above,
    select_largest_of_batch,
    sizes_are_fixed,
)
from ...ops.codes import Codes
from ...ops.transpose_codes import transpose_codes
from .late import LateCodes, LateScores, LateTensor, content_of, dense, late_tensor
from .replacement import Methods

# How many latents a search for the largest of a batch begins with, for each module.
_WIDTHS: WeakKeyDictionary[nn.Module, Width] = WeakKeyDictionary()


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


@contextmanager
def late_inside() -> Iterator[None]:
    """Let encoders that are called inside return late tensors; other callers get dense ones."""
    _inside.depth += 1
    try:
        yield
    finally:
        _inside.depth -= 1


def as_returned(activations: Tensor) -> Tensor:
    """Return activations as an encoder returns them: dense, but late inside `late_inside`."""
    return activations if _inside.depth else dense(activations)


def runs_on_codes(x: Tensor, *modules: nn.Module) -> bool:
    """Return False where the library's own code has to run.

    So it does where sizes cannot depend on numbers (compiled code, vmap, CUDA graphs), and where a
    module between scores and activations has hooks: these get dense tensors.
    """
    return x.is_floating_point() and not sizes_are_fixed(x) and not any(map(has_hooks, modules))


def late_scores(scores: Scores, *, relu: bool = False) -> LateTensor:
    """Return the scores of all latents, after ReLU or not."""
    return late_tensor(LateScores(scores, relu, 0, scores.latents))


def topk_activations(scores: Scores, k: int, *, groups: int = 1) -> LateCodes:
    """Return the activations of TopK."""
    values, indices, transposition = scores.topk(k, groups=groups)
    return LateCodes(values, indices, scores.latents, transposition)


def batch_topk_activations(
    module: nn.Module, scores: Scores, k: int | float, used: int | None = None
) -> LateCodes | None:
    """Return the activations of BatchTopK in training; None where dense scores are faster.

    Args:
        module: whose activations they are.
        scores: of all latents.
        k: how many a row keeps on average.
        used: activations of later latents are zero, after the selection.
    """
    rows = scores.x.numel() // scores.x.shape[-1]
    if int(k * rows) < 1:
        return None
    width = _WIDTHS.setdefault(module, Width())
    unscaled = scores.unscaled() if width.favours_dense(scores.latents) else None
    selected = select_largest_of_batch(k, scores, width, unscaled)
    if selected is None:
        return None
    _, indices, kept = selected
    if used is not None:
        kept = kept & (indices < used)
    transposition = transpose_codes(indices, scores.latents)
    values = torch.where(kept, scores.at(indices, transposition).relu(), 0)
    return LateCodes(values, indices, scores.latents, transposition)


def threshold_activations(module: nn.Module, scores: Scores, threshold: Tensor) -> Tensor:
    """Return the activations of scores above a threshold and above zero.

    They are late, or dense where rows have so many that this is faster.

    Args:
        module: whose activations they are.
        scores: of all latents.
        threshold: [N], or 0-d for all latents.
    """
    width = _WIDTHS.setdefault(module, Width())
    lowest = threshold.detach().clamp_min(0)
    if threshold.dim():
        selected = select_above(scores, 0.0, width, lowest)
    else:
        selected = select_above(scores, lowest, width)
    if isinstance(selected, Tensor):
        return torch.where(selected > lowest, selected, 0)
    indices, transposition = selected
    z = scores.at(indices, transposition)
    at_codes = lowest[indices] if threshold.dim() else lowest
    values = torch.where(z > at_codes, z, 0)
    return late_tensor(LateCodes(values, indices, scores.latents, transposition))


def found_codes(activations: Tensor) -> Tensor:
    """Return dense activations as late ones, where decoding their codes is faster.

    So it is on a CPU if at most one in NARROWEST is not zero in every row. Activations that need a
    gradient stay dense, since latents that are zero have one, too.
    """
    dense_path = isinstance(activations, LateTensor) or not activations.is_cpu
    if dense_path or activations.dim() == 0 or not runs_on_codes(activations):
        return activations
    if activations.requires_grad and torch.is_grad_enabled():
        return activations
    active = activations != 0
    n = activations.shape[-1]
    if active.numel() == 0 or int(active.sum(-1).max()) * NARROWEST > n:
        return activations
    return late_tensor(LateCodes(*codes_where(activations, active), n))


def codes_of(activations: Tensor) -> Codes:
    """Return the codes of activations [..., n], late or dense."""
    content = content_of(activations)
    if isinstance(content, LateCodes):
        return Codes(content.values, content.indices)
    activations = dense(activations)
    return codes_where(activations, activations.detach() != 0)


class EncodesDense(Methods):
    """Of a library whose ``encode`` returns the activations alone."""

    __slots__ = ()

    def encode_sparse(self, x: Tensor) -> Codes:
        """Return the codes of x: values [..., k] and indices int64 [..., k]."""
        with late_inside():
            return codes_of(self.encode(x))
