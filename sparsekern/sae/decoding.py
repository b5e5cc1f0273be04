"""Reconstructions from codes: from all latents, and from prefixes of them.

A latent belongs to the first prefix that contains it. The codes of the latents that belong to a
prefix are packed into narrower codes, so all prefixes together read little more of the dictionary
than one reconstruction does. Each reconstruction is the sum of the one before and of its own codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.scores import sizes_are_fixed
from ..ops.checks import autocasting, check_weight_dtype
from ..ops.codes import Transposition
from ..ops.linear_at import vector_at
from ..ops.sparse_matmul import sparse_matmul
from .encoding import Encoding


@dataclass(frozen=True)
class Decoder:
    """The map from codes to codes @ (dictionary / norms) + bias.

    None stands for norms of 1, and for a bias of 0.
    """

    dictionary: Tensor
    bias: Tensor | None
    norms: Tensor | None

    def __call__(self, encoding: Encoding, prefixes: Sequence[int] = ()) -> list[Tensor]:
        """Return reconstructions [..., D] from each prefix of the latents and, last, from all."""
        if encoding.dense:
            return self._dense(encoding.values, prefixes)
        if not prefixes:
            return [self.sparse(*encoding[:3])]
        reconstructions: list[Tensor] = []
        for values, indices in split_codes(encoding.values, encoding.indices, prefixes):
            part = self.sparse(values, indices, biased=not reconstructions)
            reconstructions.append(reconstructions[-1] + part if reconstructions else part)
        return reconstructions

    def sparse(
        self,
        values: Tensor,
        indices: Tensor,
        transposition: Transposition | None = None,
        *,
        biased: bool = True,
    ) -> Tensor:
        """Return the reconstruction [..., D] from codes [..., k]; biased: add the bias."""
        if self.norms is not None:
            values = values / vector_at(self.norms, indices, transposition).to(values.dtype)
        bias = self.bias if biased else None
        return sparse_matmul(values, indices, self.dictionary, bias, transposition=transposition)

    def _dense(self, values: Tensor, prefixes: Sequence[int]) -> list[Tensor]:
        factors = values if self.norms is None else values / self.norms.to(values.dtype)
        reconstructions: list[Tensor] = []
        ends = (*prefixes, len(self.dictionary))
        for first, last in itertools.pairwise((0, *ends)):
            part = self.dictionary[first:last].t()
            bias = None if reconstructions else self.bias
            product = dense_product(factors[..., first:last], part, bias)
            reconstructions.append(reconstructions[-1] + product if reconstructions else product)
        return reconstructions


def dense_product(factors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return factors @ weight.T + bias in factors' dtype.

    A float32 weight of 16-bit factors is not rounded, as in sparse_matmul.
    """
    check_weight_dtype("decode", factors, weight, "values", "values'", "16-bit values")
    if factors.dtype == weight.dtype or autocasting(factors):
        return nn.functional.linear(factors, weight, bias)
    return nn.functional.linear(factors.to(weight.dtype), weight, bias).to(factors.dtype)


def split_codes(
    values: Tensor, indices: Tensor, prefixes: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the codes of the latents that belong to each prefix and, last, to none.

    Args:
        values: [..., w].
        indices: [..., w].
        prefixes: ascending numbers of first latents.

    Yields:
        values and indices, as wide as the fullest row needs; shorter rows end in zeros.
    """
    bounds = torch.tensor(prefixes, device=indices.device)
    levels = torch.bucketize(indices, bounds, right=True)
    order = levels.argsort(dim=-1, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    level_ids = torch.arange(len(prefixes) + 1, device=indices.device)
    counts = (levels.unsqueeze(-1) == level_ids).sum(-2)  # [..., levels]
    starts = counts.cumsum(-1) - counts
    per_row = counts.reshape(-1, len(level_ids))
    if sizes_are_fixed(values):
        widths = [indices.shape[-1]] * len(level_ids)
    else:
        widths = per_row.amax(0).tolist() if len(per_row) else [0] * len(level_ids)
    for level, width in enumerate(widths):
        slots = torch.arange(max(width, 1), device=indices.device)
        positions = (starts[..., level, None] + slots).clamp_max(indices.shape[-1] - 1)
        used = slots < counts[..., level, None]
        yield torch.where(used, values.gather(-1, positions), 0), indices.gather(-1, positions)
