"""How a sparse autoencoder finds its codes, for each of its activations.

The scores of all latents, [B, N], are not stored. Latents that may be active are selected slice by
slice (see ops/linear_topk/slices.py), without gradients. Their scores are then computed again as a
part of the graph (ops/linear_at.py), and the activation is applied to them. Since a latent that is
not active has no gradient, these are the gradients of the dense expression.

TopK keeps a fixed number of latents in each row. For the others the number differs from row to row,
so the selection takes the largest scores of each row, as many as the last selections needed, and
looks at the last of them: if it still qualifies, the row may have more, and the selection is made
again with twice as many. When some row has more than one in NARROWEST latents active, the dense
expression is faster, and is what is used. Which of the two it is follows from the input alone, and
so does what is recorded for the backward pass (gradient checkpointing compares it). Where sizes
cannot depend on data (compiled or traced code, CUDA graphs, vmap) it is always the dense
expression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch.transforms import is_fake, traced_or_vmapped
from ..nn import BatchTopK, JumpReLU, TopK
from ..ops.batch_topk import batch_topk, kept_in_all
from ..ops.batch_topk.candidates import largest_of_list
from ..ops.codes import Codes, Transposition
from ..ops.jumprelu import at_most, jumprelu, step
from ..ops.linear_at import linear_at, vector_at
from ..ops.linear_topk import linear_topk, linear_topk_transposed
from ..ops.transpose_codes import transpose_codes

# Dense scores win when rows need more than one latent in so many; measured on a CPU.
NARROWEST = 8
SMALLEST_SCALE = 1e-20


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

    def topk(
        self, k: int, *, groups: int = 1, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Transposition]:
        """The k largest of each row, ascending indices, with ReLU: values, indices, and the
        transposition of these."""
        codes, transposition = linear_topk_transposed(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            groups=groups, latents=latents,
        )  # fmt: skip
        return *codes, transposition

    @torch.no_grad()
    def largest(self, k: int) -> Codes:
        """The k largest of each row, largest first, without gradients."""
        return linear_topk(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            relu=False, sorted=True,
        )  # fmt: skip

    def at(self, indices: Tensor, transposition: Transposition) -> Tensor:
        """The scores of some latents of each row."""
        return linear_at(
            self.x, self.weight, self.bias, indices, pre_bias=self.pre_bias, scale=self.scale,
            transposition=transposition,
        )  # fmt: skip

    def all(self, known: Tensor | None = None) -> Tensor:
        """All of them, [..., N]; known: what `unscaled` gives, where it was computed."""
        if torch.compiler.is_compiling():
            scores = self._linear()
        else:  # recorded in one way, whether it was known or not
            known = self.unscaled() if known is None else known
            scores = _KnownLinear.apply(*self._factors(known.dtype), known)
        return scores if self.scale is None else scores * self.scale.to(scores.dtype)

    @torch.no_grad()
    def unscaled(self) -> Tensor:
        """All of them divided by the scale, [..., N], recording nothing for a backward pass."""
        return self._linear()

    def _linear(self) -> Tensor:
        return nn.functional.linear(*self._factors(self.x.dtype))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x - pre_bias, weight and bias in a dtype."""
        centred = (self.x - self.pre_bias).to(self.x.dtype)
        return centred.to(dtype), self.weight.to(dtype), self.bias.to(dtype)

    def only(self, wanted: Tensor) -> Scores:
        """Scores that are -inf but for the wanted latents (bool [N])."""
        scale = self.scale
        if scale is not None:
            scale = torch.where(wanted, scale, 1)  # -inf * 0 is NaN
        return replace(self, bias=torch.where(wanted, self.bias, -torch.inf), scale=scale)

    def lowered(self, threshold: Tensor) -> Scores:
        """Scores minus a threshold [N] of each latent (scores of scale zero stay zero)."""
        offset = threshold
        if self.scale is not None:
            offset = threshold / self.scale.clamp_min(SMALLEST_SCALE)
        return replace(self, bias=self.bias - offset)


class _KnownLinear(torch.autograd.Function):
    """x @ weight.T + bias, whose value is known: records its gradient and computes nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, known: Tensor) -> Tensor:
        return known.view_as(known)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


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
    """How many latents the fullest row had the last time. It decides where a search begins, not
    what it finds."""

    count: int = 48

    def first(self, most: int) -> int:
        """How many latents of a row to look at first."""
        return min(self.count + self.count // 4 + 8, most)

    def dense(self, latents: int) -> bool:
        """Whether dense scores were faster the last time."""
        return self.count * NARROWEST > latents

    def note(self, active: Tensor) -> None:
        """Take in which scores [..., m] were active, for which the host waits."""
        self.count = int(active.sum(-1).max()) if active.numel() else 0


def encode(layer: nn.Module, scores: Scores, width: Width) -> Encoding:
    """Codes of an activation layer, in the layer's training or evaluation mode.

    A layer with hooks is called with all scores, and what it then returns are the codes: hooks see,
    and may replace, its dense input and output.
    """
    if _has_hooks(layer):
        return _called(layer, scores.all())
    return _ENCODERS[type(layer)](layer, scores, width)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _called(layer: nn.Module, scores: Tensor) -> Encoding:
    """What a layer returns for all scores, with the penalty that it has."""
    encoding = _dense(layer(scores))
    if isinstance(layer, JumpReLU):
        return encoding._replace(penalty=_total(step(scores, layer.threshold, *layer.band)))
    if isinstance(layer, nn.ReLU):
        return encoding._replace(penalty=_total(encoding.values))
    return encoding


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
    if isinstance(layer, TopK) and layer.use_sparse_activations:
        raise ValueError(
            f"{op}: activation must have use_sparse_activations=False, since the model passes on "
            "codes, got True"
        )
    if isinstance(layer, (TopK, BatchTopK)):
        if layer.counter is not None:
            raise ValueError(f"{op}: activation must have no counter, since the model has one")
        if layer.k > latents:
            raise ValueError(f"{op}: k must be at most {latents}, the latents, got {layer.k}")
    if isinstance(layer, JumpReLU) and layer.log_threshold.shape != (latents,):
        raise ValueError(
            f"{op}: activation must have {latents} thresholds, one a latent, "
            f"got {list(layer.log_threshold.shape)}"
        )


def sizes_are_fixed(x: Tensor) -> bool:
    """Whether no size may follow from the numbers in x: in compiled code, while a CUDA graph is
    captured, and where there are none or they are not the only ones."""
    if torch.compiler.is_compiling() or is_fake(x):
        return True
    if traced_or_vmapped():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


def _topk(layer: TopK, scores: Scores, _: Width) -> Encoding:
    return Encoding(*scores.topk(layer.k, groups=layer.groups), _nothing(scores.x))


def _relu(_: nn.ReLU, scores: Scores, width: Width) -> Encoding:
    found = _above(scores, 0.0, width)
    if isinstance(found, Tensor):
        values = found.relu()
        return _dense(values)._replace(penalty=_total(values))
    values = scores.at(*found).relu()
    return Encoding(values, *found, _total(values))


def _jumprelu(layer: JumpReLU, scores: Scores, width: Width) -> Encoding:
    # The pseudo-derivative reaches half a bandwidth below the threshold.
    theta, (bandwidth, relative) = layer.threshold, layer.band
    lowest = theta.detach() * (1 - bandwidth / 2) if relative else theta.detach() - bandwidth / 2
    found = _above(scores, 0.0, width, lowest)
    if isinstance(found, Tensor):
        penalty = _total(step(found, theta, bandwidth, relative))
        return _dense(layer(found))._replace(penalty=penalty)
    z, limit = scores.at(*found), vector_at(theta, *found)
    values = jumprelu(z, limit, bandwidth, relative)
    return Encoding(values, *found, _total(step(z, limit, bandwidth, relative)))


def _batch_topk(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if layer.training:
        return _trained_batch_topk(layer, scores, width)
    threshold = layer.known_threshold()
    found = _above(scores, threshold, width)
    if isinstance(found, Tensor):
        return _dense(layer(found))
    z = scores.at(*found)
    return Encoding(torch.where(at_most(z, threshold), 0, z), *found, _nothing(scores.x))


def _trained_batch_topk(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if sizes_are_fixed(scores.x):
        return _dense(layer(scores.all()))
    known = scores.unscaled() if width.dense(scores.latents) else None
    chosen = _largest_of_batch(layer, scores, width, known)
    if chosen is None:
        return _dense(layer(scores.all(known)))
    indices, kept = chosen
    transposition = transpose_codes(indices, scores.latents)
    values = torch.where(kept, scores.at(indices, transposition).relu(), 0)
    return Encoding(values, indices, transposition, _nothing(scores.x))


_ENCODERS: dict[type[nn.Module], Callable[..., Encoding]] = {
    TopK: _topk,
    BatchTopK: _batch_topk,
    JumpReLU: _jumprelu,
    nn.ReLU: _relu,
}


def _total(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _dense(values: Tensor) -> Encoding:
    indices = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    return Encoding(values, indices, None, _nothing(values), dense=True)


def _above(
    scores: Scores, floor: float | Tensor, width: Width, theta: Tensor | None = None
) -> tuple[Tensor, Transposition] | Tensor:
    """Indices, with their transposition, that contain every score above a floor (with theta [N]:
    every score that is above it when theta is subtracted), as wide as the fullest row needs; or all
    scores, where that is faster."""
    n = scores.latents
    if sizes_are_fixed(scores.x):
        return scores.all()
    # One element: a number, or a 0-d tensor, would be rounded to the scores' dtype.
    wide = torch.promote_types(scores.x.dtype, torch.float32)
    floor = torch.as_tensor(floor, dtype=wide, device=scores.x.device).reshape(1)
    if width.dense(n):
        known = scores.unscaled()
        with torch.no_grad():
            seen = scores.all(known)
            width.note(~at_most(seen if theta is None else seen - theta, floor))
        if width.dense(n):
            return scores.all(known)
    searched = scores if theta is None else scores.lowered(theta)
    found = _search(searched, lambda values: ~at_most(values, floor), width)
    if found is None:
        return scores.all()
    indices = found[1]
    return indices, transpose_codes(indices, n)


@torch.no_grad()
def _largest_of_batch(
    layer: BatchTopK, scores: Scores, width: Width, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Indices and which of them are among the k B largest scores of the batch; None where dense
    scores are faster."""
    n = scores.latents
    if known is not None:
        width.note(batch_topk(scores.all(known), layer.k, relu=True) != 0)
        if width.dense(n):
            return None
    least = int(layer.k) + 1
    if least > _most(n):
        width.count = _most(n)
        return None
    found = _search(scores, lambda values: _kept(values, layer.k) & ~(values <= 0), width, least)
    if found is None:
        return None
    values, indices, kept = found
    layer.observe(values[kept])
    return indices, kept


def _most(latents: int) -> int:
    """How many latents of a row are looked at before dense scores are taken."""
    return min(latents, latents // NARROWEST + 1)


@torch.no_grad()
def _search(
    scores: Scores, active: Callable[[Tensor], Tensor], width: Width, least: int = 1
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The largest scores of each row, with indices and which of them are active, as wide as the
    fullest row needs; None where dense scores are faster.

    active: of scores, largest first, which are active; in a row, all before one that is. NaN
    counts, and is passed on.
    """
    most = _most(scores.latents)
    k = max(width.first(most), least)
    while True:
        values, indices = scores.largest(k)
        found = active(values)
        if not found[..., -1].any():
            width.note(found)
            break
        if k == most:
            width.count = most
            return None
        k = min(2 * k, most)
    if width.dense(scores.latents):
        return None
    used = slice(0, max(width.count, 1))
    return values[..., used], indices[..., used].contiguous(), found[..., used]


def _kept(candidates: Tensor, k: float) -> Tensor:
    """Which of the candidates [..., m], largest first, are among the k B largest of all."""
    flat = candidates.reshape(-1)
    rows = flat.numel() // candidates.shape[-1]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if rows > 0:
        total = kept_in_all("BatchTopK", k, rows)
        places = torch.arange(len(flat), device=flat.device)
        kept[largest_of_list(flat, places, total)[1]] = True
    return kept.view(candidates.shape)
