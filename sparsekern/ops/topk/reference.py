"""The definition of top-k in torch."""

from __future__ import annotations

import torch

from ..codes_to_dense.reference import codes_to_dense_reference
from ..count_active.reference import counts_reference
from ..order import key_of


def topk_reference(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key = key_of(x.abs() if abs else x)
    order = key.sort(dim=-1, descending=not smallest, stable=True).indices
    indices = order[..., :k].contiguous()
    if not sorted:
        indices = indices.sort(dim=-1).values
    values = x.gather(-1, indices)
    if relu:
        values = torch.where(values <= 0, 0, values)
    n = x.shape[-1]
    counts = counts_reference(indices, n, values) if count else indices.new_empty(0)
    return values, indices, counts


def topk_mask_reference(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, indices, counts = topk_reference(x, k, False, relu, abs, count)
    return codes_to_dense_reference(values, indices, x.shape[-1]), values, indices, counts
