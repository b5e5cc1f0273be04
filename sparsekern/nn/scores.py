"""Scores of a linear layer that are computed only as far as needed, and searches among them.

The scores of all latents, [B, N], are not stored. Latents that may be active are selected slice by
slice (see ops/linear_topk/slices.py), without gradients. Their scores are then computed again as a
part of the graph (ops/linear_at.py), and an activation is applied to them. Since a latent that is
not active has no gradient, these are the gradients of the dense expression.

Where the number of active latents differs from row to row, the search takes the largest scores of
each row, about as many as the last batch needed. If the last of them is active, the row may have
more, and the search is repeated with twice as many. If some row has more than one in NARROWEST
latents active, the dense expression is used, which is faster then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch.transforms import is_fake, traced_or_vmapped
from ..ops.batch_topk import batch_topk, kept_in_all
from ..ops.batch_topk.candidates import largest_of_list
from ..ops.checks import autocasting
from ..ops.codes import Codes, Transposition
from ..ops.jumprelu import at_most
from ..ops.linear_at import codes_at, linear_at
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

    @property
    def dtype(self) -> torch.dtype:
        """Of scores that are computed as far as needed: in an autocast region its own."""
        x = self.x
        if not autocasting(x) or x.dtype == torch.float64:
            return x.dtype
        return torch.get_autocast_dtype(x.device.type)

    def topk(
        self, k: int, *, groups: int = 1, latents: Tensor | None = None, relu: bool = True
    ) -> tuple[Tensor, Tensor, Transposition]:
        """Return the k largest of each row: values after ReLU, indices, their transposition.

        Indices ascend.
        """
        codes, transposition = linear_topk_transposed(
            self.x, self.weight, self.bias, k, pre_bias=self.pre_bias, scale=self.scale,
            groups=groups, latents=latents, relu=relu,
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

    def codes(
        self, values: Tensor, chosen: Tensor, indices: Tensor, transposition: Transposition
    ) -> Tensor:
        """Return the codes of some latents of each row, whose scores are given; zero unless chosen.

        Args:
            values: [..., m], scores that a search has found.
            chosen: bool [..., m].
            indices: [..., m].
            transposition: of the indices.
        """
        return codes_at(
            values, chosen, self.x, self.weight, self.bias, indices, transposition,
            pre_bias=self.pre_bias, scale=self.scale,
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

    def tensors(self) -> list[Tensor]:
        """Return what the scores are computed from."""
        candidates = (self.x, self.weight, self.bias, self.pre_bias, self.scale)
        return [tensor for tensor in candidates if tensor is not None]

    def detached(self) -> Scores:
        """Return the same scores without gradients."""
        pre_bias = None if self.pre_bias is None else self.pre_bias.detach()
        scale = None if self.scale is None else self.scale.detach()
        return Scores(
            self.x.detach(), self.weight.detach(), self.bias.detach(), pre_bias, scale
        )  # fmt: skip

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


def select_above(
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
def select_largest_of_batch(
    k: int | float, scores: Scores, width: Width, unscaled: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Select at least the k B largest scores of the batch.

    Args:
        k: how many to keep of a row on average.
        scores: of all latents.
        width: the number of active latents in the fullest row of the last batch; updated.
        unscaled: the result of `scores.unscaled`, if it is at hand.

    Returns:
        Scores, indices, and True for those that are above zero and among the k B largest (bool);
        None if dense scores are faster.
    """
    n = scores.latents
    if unscaled is not None:
        width.measure(batch_topk(scores.all(unscaled), k, relu=True) != 0)
        if width.favours_dense(n):
            return None
    least = int(k) + 1
    if least > _search_limit(n):
        width.count = _search_limit(n)
        return None

    def is_kept(candidates: Tensor) -> Tensor:
        return _among_largest(candidates, k) & ~(candidates <= 0)

    return _search(scores, is_kept, width, least)


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
