"""The codes of a sparse autoencoder, for each of its activations.

The scores of all latents, [B, N], are not stored. Latents that may be active are selected slice by
slice (see ops/linear_topk/slices.py), without gradients. Their scores are then computed again as a
part of the graph (ops/linear_at.py), and the activation is applied to them. Since a latent that is
not active has no gradient, these are the gradients of the dense expression.

TopK keeps a fixed number of latents in each row. For the others the number differs from row to row,
so the selection takes the largest scores of each row, about as many as the last batch needed. If
the last of them is active, the row may have more, and the selection is repeated with twice as many.
If some row has more than one in NARROWEST latents active, the dense expression is used, which is
faster then. Which of the two is used depends on the input alone, and so does what is recorded for
the backward pass (gradient checkpointing compares it). Where sizes cannot depend on data (compiled
or traced code, CUDA graphs, vmap) the dense expression is used.
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

# Dense scores are faster if rows need more than one latent in so many; measured on a CPU.
NARROWEST = 8
SMALLEST_SCALE = 1e-20


@dataclass(frozen=True)
class Scores:
    """Scores ((x - pre_bias) @ weight.T + bias) * scale, computed only as far as needed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    pre_bias: Tensor | None
    scale: Tensor | None

    @property
    def latents(self) -> int:
        """Number of scores of a row."""
        return len(self.weight)

    def topk(
        self, k: int, *, groups: int = 1, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Transposition]:
        """Return the k largest of each row after ReLU: values, indices, their transposition.

        Indices ascend.
        """
        codes, transposition = linear_topk_transposed(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            groups=groups, latents=latents,
        )  # fmt: skip
        return *codes, transposition

    @torch.no_grad()
    def largest(self, k: int) -> Codes:
        """Return the k largest of each row, largest first, without gradients."""
        return linear_topk(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            relu=False, sorted=True,
        )  # fmt: skip

    def at(self, indices: Tensor, transposition: Transposition) -> Tensor:
        """Return the scores of some latents of each row."""
        return linear_at(
            self.x, self.weight, self.bias, indices, pre_bias=self.pre_bias, scale=self.scale,
            transposition=transposition,
        )  # fmt: skip

    def all(self, unscaled: Tensor | None = None) -> Tensor:
        """Return all scores, [..., N]; unscaled: the result of `unscaled`, if it is at hand."""
        if torch.compiler.is_compiling():
            scores = self._linear()
        else:  # recorded in the same way, whether it was at hand or not
            unscaled = self.unscaled() if unscaled is None else unscaled
            scores = _ComputedLinear.apply(*self._factors(unscaled.dtype), unscaled)  # type: ignore[no-untyped-call]
        return scores if self.scale is None else scores * self.scale.to(scores.dtype)

    @torch.no_grad()
    def unscaled(self) -> Tensor:
        """Return all scores without the scale, [..., N], and without gradients."""
        return self._linear()

    def _linear(self) -> Tensor:
        return nn.functional.linear(*self._factors(self.x.dtype))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return x - pre_bias, weight and bias in a dtype."""
        centred = self.x if self.pre_bias is None else (self.x - self.pre_bias).to(self.x.dtype)
        return centred.to(dtype), self.weight.to(dtype), self.bias.to(dtype)

    def only(self, mask: Tensor) -> Scores:
        """Return scores that are -inf for latents outside a mask (bool [N])."""
        scale = self.scale
        if scale is not None:
            scale = torch.where(mask, scale, 1)  # -inf * 0 is NaN
        return replace(self, bias=torch.where(mask, self.bias, -torch.inf), scale=scale)

    def lowered(self, threshold: Tensor) -> Scores:
        """Return scores minus a threshold [N] of each latent (scores of scale zero stay zero)."""
        offset = threshold
        if self.scale is not None:
            offset = threshold / self.scale.clamp_min(SMALLEST_SCALE)
        # Thresholds may have another dtype.
        return replace(self, bias=(self.bias - offset).to(self.bias.dtype))


class _ComputedLinear(torch.autograd.Function):
    """The gradient of x @ weight.T + bias, whose result is already computed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

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


@dataclass
class Width:
    """Number of active latents in the fullest row of the last batch.

    A search begins there; its result does not depend on it.
    """

    count: int = 48

    def first_guess(self, limit: int) -> int:
        """Return the number of latents of a row, at most `limit`, that a search begins with."""
        return min(self.count + self.count // 4 + 8, limit)

    def favours_dense(self, latents: int) -> bool:
        """Return True if dense scores are faster for rows with so many active latents."""
        return self.count * NARROWEST > latents

    def measure(self, active: Tensor) -> None:
        """Set the count from the active ones among scores (bool [..., m]); the host waits."""
        self.count = int(active.sum(-1).max()) if active.numel() else 0


def encode(layer: nn.Module, scores: Scores, width: Width) -> Encoding:
    """Return the codes of an activation layer, in the layer's training or evaluation mode.

    A layer with hooks is called with all scores, and its output is the code: hooks get, and may
    replace, its dense input and output.
    """
    if _has_hooks(layer):
        return _call(layer, scores.all())
    return _ENCODERS[type(layer)](layer, scores, width)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


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
        if layer.k > latents:
            raise ValueError(f"{op}: k must be at most {latents}, the latents, got {layer.k}")
    if isinstance(layer, JumpReLU) and layer.log_threshold.shape != (latents,):
        raise ValueError(
            f"{op}: activation must have {latents} thresholds, one a latent, "
            f"got {list(layer.log_threshold.shape)}"
        )


def sizes_are_fixed(x: Tensor) -> bool:
    """Return True if no size may depend on the numbers in x.

    So it is in compiled and traced code, under vmap, while a CUDA graph is captured, and where x
    has no numbers.
    """
    if torch.compiler.is_compiling() or is_fake(x):
        return True
    if traced_or_vmapped():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _no_penalty(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


def _topk(layer: TopK, scores: Scores, _: Width) -> Encoding:
    return Encoding(*scores.topk(layer.k, groups=layer.groups), _no_penalty(scores.x))


def _relu(_: nn.ReLU, scores: Scores, width: Width) -> Encoding:
    selected = _select_above(scores, 0.0, width)
    if isinstance(selected, Tensor):
        values = selected.relu()
        return _dense(values)._replace(penalty=_sum_in_float32(values))
    values = scores.at(*selected).relu()
    return Encoding(values, *selected, _sum_in_float32(values))


def _jumprelu(layer: JumpReLU, scores: Scores, width: Width) -> Encoding:
    # The pseudo-derivative reaches half a bandwidth below the threshold.
    theta, (bandwidth, relative) = layer.threshold, layer.band
    lowest = theta.detach() * (1 - bandwidth / 2) if relative else theta.detach() - bandwidth / 2
    selected = _select_above(scores, 0.0, width, lowest)
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
    selected = _select_above(scores, threshold, width)
    if isinstance(selected, Tensor):
        return _dense(layer(selected))
    z = scores.at(*selected)
    return Encoding(torch.where(at_most(z, threshold), 0, z), *selected, _no_penalty(scores.x))


def _batch_topk_in_training(layer: BatchTopK, scores: Scores, width: Width) -> Encoding:
    if sizes_are_fixed(scores.x):
        return _dense(layer(scores.all()))
    unscaled = scores.unscaled() if width.favours_dense(scores.latents) else None
    selected = _select_largest_of_batch(layer, scores, width, unscaled)
    if selected is None:
        return _dense(layer(scores.all(unscaled)))
    indices, kept = selected
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


def _select_above(
    scores: Scores, floor: float | Tensor, width: Width, theta: Tensor | None = None
) -> tuple[Tensor, Transposition] | Tensor:
    """Select at least all scores above a floor; with theta [N], scores minus theta.

    Returns:
        Indices, as wide as the fullest row needs, and their transposition; or all scores, if that
        is faster.
    """
    n = scores.latents
    if sizes_are_fixed(scores.x):
        return scores.all()
    # One element: a number, or a 0-d tensor, would be rounded to the scores' dtype.
    dtype = torch.promote_types(scores.x.dtype, torch.float32)
    floor = torch.as_tensor(floor, dtype=dtype, device=scores.x.device).reshape(1)
    if width.favours_dense(n):
        unscaled = scores.unscaled()
        with torch.no_grad():
            z = scores.all(unscaled)
            width.measure(~at_most(z if theta is None else z - theta, floor))
        if width.favours_dense(n):
            return scores.all(unscaled)
    lowered = scores if theta is None else scores.lowered(theta)
    selected = _search(lowered, lambda values: ~at_most(values, floor), width)
    if selected is None:
        return scores.all()
    _, indices, _ = selected
    return indices, transpose_codes(indices, n)


@torch.no_grad()
def _select_largest_of_batch(
    layer: BatchTopK, scores: Scores, width: Width, unscaled: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Select at least the k B largest scores of the batch.

    Returns:
        Indices, and True for those among the k B largest (bool); None if dense scores are faster.
    """
    n = scores.latents
    if unscaled is not None:
        width.measure(batch_topk(scores.all(unscaled), layer.k, relu=True) != 0)
        if width.favours_dense(n):
            return None
    least = int(layer.k) + 1
    if least > _search_limit(n):
        width.count = _search_limit(n)
        return None

    def is_kept(candidates: Tensor) -> Tensor:
        return _among_largest(candidates, layer.k) & ~(candidates <= 0)

    selected = _search(scores, is_kept, width, least)
    if selected is None:
        return None
    values, indices, kept = selected
    layer.observe(values[kept])
    return indices, kept


def _search_limit(latents: int) -> int:
    """Return how many latents of a row are searched before dense scores are used."""
    return min(latents, latents // NARROWEST + 1)


@torch.no_grad()
def _search(
    scores: Scores, is_active: Callable[[Tensor], Tensor], width: Width, least: int = 1
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Search the largest scores of each row, until no row can have more active ones.

    Args:
        scores: of all latents.
        is_active: a function of scores, largest first, that is True for active ones. If one is
            active, so are all before it in its row. NaN is active.
        width: the number of active latents in the fullest row of the last batch; updated.
        least: least number of scores of a row to look at.

    Returns:
        Values, indices, and True for active ones, as wide as the fullest row needs; None if dense
        scores are faster.
    """
    limit = _search_limit(scores.latents)
    k = max(width.first_guess(limit), least)
    while True:
        values, indices = scores.largest(k)
        active = is_active(values)
        if not active[..., -1].any():
            width.measure(active)
            break
        if k == limit:
            width.count = limit
            return None
        k = min(2 * k, limit)
    if width.favours_dense(scores.latents):
        return None
    used = slice(0, max(width.count, 1))
    return values[..., used], indices[..., used].contiguous(), active[..., used]


def _among_largest(candidates: Tensor, k: float) -> Tensor:
    """Return True for the candidates [..., m], largest first, among the k B largest of all."""
    flat = candidates.reshape(-1)
    rows = flat.numel() // candidates.shape[-1]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if rows > 0:
        total = kept_in_all("BatchTopK", k, rows)
        _, positions = largest_of_list(flat, torch.arange(len(flat), device=flat.device), total)
        kept[positions] = True
    return kept.view(candidates.shape)
