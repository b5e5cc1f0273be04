"""Reconstructions from codes: from all latents, and from prefixes of them.

The code of a latent belongs to the first prefix that contains it. The codes of a prefix's own
latents are packed into narrower codes, so that all prefixes together read little more of the
dictionary than one reconstruction does; each reconstruction adds to the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.checks import autocasting, check_weight_dtype
from ..ops.codes import Transposition
from ..ops.linear_at import vector_at
from ..ops.sparse_matmul import sparse_matmul
from .encoding import Encoding, sizes_are_fixed


@dataclass(frozen=True)
class Decoder:
    """codes @ (dictionary / norms) + bias; norms None divides by nothing."""

    dictionary: Tensor
    bias: Tensor
    norms: Tensor | None

    def __call__(self, encoding: Encoding, prefixes: Sequence[int] = ()) -> list[Tensor]:
        """The reconstructions [..., D] from each prefix of the latents and, last, from all."""
        if encoding.dense:
            return self._dense(encoding.values, prefixes)
        if not prefixes:
            return [self.sparse(*encoding[:3])]
        made: list[Tensor] = []
        for values, indices in split_codes(encoding.values, encoding.indices, prefixes):
            part = self.sparse(values, indices, biased=not made)
            made.append(made[-1] + part if made else part)
        return made

    def sparse(
        self,
        values: Tensor,
        indices: Tensor,
        transposition: Transposition | None = None,
        *,
        biased: bool = True,
    ) -> Tensor:
        """The reconstruction [..., D] from codes [..., k]."""
        if self.norms is not None:
            values = values / vector_at(self.norms, indices, transposition).to(values.dtype)
        bias = self.bias if biased else None
        return sparse_matmul(values, indices, self.dictionary, bias, transposition=transposition)

    def _dense(self, values: Tensor, prefixes: Sequence[int]) -> list[Tensor]:
        factors = values if self.norms is None else values / self.norms.to(values.dtype)
        made: list[Tensor] = []
        ends = (*prefixes, len(self.dictionary))
        for first, last in itertools.pairwise((0, *ends)):
            part = self.dictionary[first:last].t()
            bias = None if made else self.bias
            product = dense_product(factors[..., first:last], part, bias)
            made.append(made[-1] + product if made else product)
        return made


def dense_product(factors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """factors @ weight.T + bias in factors' dtype; 16-bit factors meet a float32 weight as it is,
    as in sparse_matmul."""
    check_weight_dtype("decode", factors, weight, "values", "values'", "16-bit values")
    if factors.dtype == weight.dtype or autocasting(factors):
        return nn.functional.linear(factors, weight, bias)
    return nn.functional.linear(factors.to(weight.dtype), weight, bias).to(factors.dtype)


def split_codes(
    values: Tensor, indices: Tensor, prefixes: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes [..., w] -> for each prefix, and for the rest, the codes of the latents that the
    prefix before does not contain, as codes as wide as the fullest row needs, zeros in others."""
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
        places = (starts[..., level, None] + slots).clamp_max(indices.shape[-1] - 1)
        mine = slots < counts[..., level, None]
        yield torch.where(mine, values.gather(-1, places), 0), indices.gather(-1, places)
