"""How a sparse autoencoder finds its codes, for each of its activations.

The scores of all latents, [B, N], are not stored. What can be active is selected slice by slice
(see ops/linear_slices.py), without gradients; the scores of the selected latents are then computed
again as a part of the graph (ops/linear_at.py), and the activation is applied to them. Since a
latent that is not active passes nothing on, these are the gradients of the dense expression.

TopK keeps a fixed number of latents in each row. For the others the number differs from row to row,
so the selection takes the largest `width` scores of each row and looks at the last of them: if it
still qualifies, the row may have more, and the selection is made again with twice the width. When a
row needs more than one in NARROWEST latents, the dense expression is faster, and is what is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import BatchTopK, JumpReLU, TopK
from ..ops.batch_topk import first_of_list
from ..ops.jumprelu import at_most, jumprelu, step
from ..ops.linear_at import linear_at, vector_at
from ..ops.linear_topk import TransposedCodes, linear_topk
from ..ops.topk import Codes
from ..ops.transposition import Transposition, transpose_codes

# Dense scores win when rows need more than one latent in so many; measured on a CPU.
NARROWEST = 8


@dataclass(frozen=True)
class Scores:
    """((x - pre_bias) @ weight.T + bias) * scale, to be computed where it is needed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    pre_bias: Tensor
    scale: Tensor | None

    @property
    def latents(self) -> int:
        """How many scores a row has."""
        return len(self.weight)

    def topk(self, k: int, *, groups: int = 1, latents: Tensor | None = None) -> TransposedCodes:
        """The k largest of each row, ascending indices, with ReLU."""
        return linear_topk(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            groups=groups, latents=latents, return_transposition=True,
        )  # fmt: skip

    @torch.no_grad()
    def largest(self, k: int) -> Codes:
        """The k largest of each row, largest first, without gradients."""
        codes = linear_topk(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            relu=False, sorted=True,
        )  # fmt: skip
        return Codes(*codes)

    def at(self, indices: Tensor, transposition: Transposition) -> Tensor:
        """The scores of some latents of each row."""
        return linear_at(
            self.x, self.weight, self.bias, indices, pre_bias=self.pre_bias, scale=self.scale,
            transposition=transposition,
        )  # fmt: skip

    def all(self) -> Tensor:
        """All of them, [..., N]."""
        scores = nn.functional.linear(self.x - self.pre_bias, self.weight, self.bias)
        return scores if self.scale is None else scores * self.scale

    def lowered(self, threshold: Tensor) -> Scores:
        """Scores minus a threshold [N] of each latent."""
        offset = threshold if self.scale is None else threshold / self.scale
        return replace(self, bias=self.bias - offset)


class Encoding(NamedTuple):
    """What an activation gives.

    values, indices: [..., w], zeros where a row has fewer active latents. dense: w = N and the
    indices are 0..N-1. penalty: what the activation's sparsity loss adds up over the rows.
    """

    values: Tensor
    indices: Tensor
    transposition: Transposition | None
    penalty: Tensor
    dense: bool = False


@dataclass
class Width:
    """How many latents of a row a selection begins with; follows what the last ones needed."""

    value: int = 64

    def needed(self, count: int) -> None:
        """Take note of the largest number of latents that a row had."""
        self.value = count + count // 4 + 8


def encode(layer: nn.Module, scores: Scores, width: Width) -> Encoding:
    """Codes of an activation layer, in the layer's training or evaluation mode."""
    return _ENCODERS[type(layer)](layer, scores, width)


def check_activation(layer: nn.Module, latents: int) -> None:
    """An activation that `encode` knows, fitting the number of latents.

    Raises:
        TypeError: another layer.
        ValueError: one with options that codes cannot express, or of another width.
    """
    op = "SparseAutoencoder"
    if type(layer) not in _ENCODERS:
        known = ", ".join(kind.__name__ for kind in _ENCODERS)
        raise TypeError(f"{op}: activation must be one of {known}, got {type(layer).__name__}")
    if isinstance(layer, TopK) and not layer.is_plain:
        raise ValueError(f"{op}: activation must have ReLU and no abs, got {layer}")
    if isinstance(layer, JumpReLU) and layer.log_threshold.shape != (latents,):
        raise ValueError(
            f"{op}: activation must have {latents} thresholds, one a latent, "
            f"got {list(layer.log_threshold.shape)}"
        )


def _nothing(scores: Scores) -> Tensor:
    return torch.zeros((), device=scores.x.device)


def _topk(layer: TopK, scores: Scores, width: Width) -> Encoding:
    codes = scores.topk(layer.k, groups=layer.groups)
    return Encoding(*codes, _nothing(scores))


def _relu(layer: nn.ReLU, scores: Scores, width: Width) -> Encoding:
    found = _above(scores, 0.0, width)
    if found is None:
        encoding = _dense(scores, torch.relu, width)
        return encoding._replace(penalty=_total(encoding.values))
    indices, transposition = found
    values = scores.at(indices, transposition).relu()
    return Encoding(values, indices, transposition, _total(values))


def _jumprelu(layer: JumpReLU, scores: Scores, width: Width) -> Encoding:
    # The pseudo-derivative reaches half a bandwidth below the threshold.
    theta = layer.threshold
    found = _above(scores.lowered(theta.detach()), -layer.bandwidth / 2, width)
    if found is None:
        dense = scores.all()
        penalty = _total(step(dense, theta, layer.bandwidth))
        return _dense(scores, layer, width, dense)._replace(penalty=penalty)
    indices, transposition = found
    z, limit = scores.at(indices, transposition), vector_at(theta, indices, transposition)
    values = jumprelu(z, limit, layer.bandwidth)
    return Encoding(values, indices, transposition, _total(step(z, limit, layer.bandwidth)))


def _batch_topk(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if not layer.training:
        threshold = layer.known_threshold()
        found = _above(scores, threshold, width)
        if found is None:
            return _dense(scores, layer, width)
        indices, transposition = found
        z = scores.at(indices, transposition)
        return Encoding(
            torch.where(at_most(z, threshold), 0, z), indices, transposition, _nothing(scores)
        )
    chosen = _largest_of_batch(layer, scores, width)
    if chosen is None:
        return _dense(scores, layer, width)
    indices, kept = chosen
    transposition = transpose_codes(indices, scores.latents)
    values = torch.where(kept, scores.at(indices, transposition).relu(), 0)
    return Encoding(values, indices, transposition, _nothing(scores))


_ENCODERS: dict[type[nn.Module], Callable[..., Encoding]] = {
    TopK: _topk,
    BatchTopK: _batch_topk,
    JumpReLU: _jumprelu,
    nn.ReLU: _relu,
}


def _total(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _dense(
    scores: Scores,
    activation: Callable[[Tensor], Tensor],
    width: Width,
    dense: Tensor | None = None,
) -> Encoding:
    values = activation(scores.all() if dense is None else dense)
    _fullest(values.detach() != 0, width)
    indices = torch.arange(scores.latents, device=values.device).expand(values.shape)
    return Encoding(values, indices, None, _nothing(scores), dense=True)


@torch.no_grad()
def _above(
    scores: Scores, floor: float | Tensor, width: Width
) -> tuple[Tensor, Transposition] | None:
    """Indices that contain every score above a floor, as wide as the fullest row needs; None where
    dense scores are faster."""
    n, k = scores.latents, width.value
    while k * NARROWEST <= n:
        values, indices = scores.largest(k)
        above = ~(values <= floor)  # NaN counts, and is passed on
        if not above[..., -1].any():
            used = _fullest(above, width)
            indices = indices[..., :used].contiguous()
            return indices, transpose_codes(indices, n)
        k *= 2
    return None


@torch.no_grad()
def _largest_of_batch(
    layer: BatchTopK, scores: Scores, width: Width
) -> tuple[Tensor, Tensor] | None:
    """Indices and which of them are among the k B largest scores of the batch; None where dense
    scores are faster."""
    n, k = scores.latents, max(width.value, int(layer.k) + 1)
    while k * NARROWEST <= n:
        values, indices = scores.largest(k)
        kept = _kept(values, layer.k)
        if not kept[..., -1].any():
            kept &= ~(values <= 0)
            layer.observe(values[kept])
            used = _fullest(kept, width)
            return indices[..., :used].contiguous(), kept[..., :used]
        k *= 2
    return None


def _kept(candidates: Tensor, k: float) -> Tensor:
    """Which of the candidates [..., m], largest first, are among the k B largest of all."""
    flat = candidates.reshape(-1)
    rows = flat.numel() // candidates.shape[-1]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if total := int(k * rows):
        places = torch.arange(len(flat), device=flat.device)
        kept[first_of_list(flat, places, total)[1]] = True
    return kept.view(candidates.shape)


def _fullest(active: Tensor, width: Width) -> int:
    """The largest number of active latents in a row, at least 1."""
    count = int(active.sum(-1).max()) if active.numel() else 0
    width.needed(count)
    return max(count, 1)
