"""The definition of linear_topk in torch."""

from __future__ import annotations

import torch

from ..topk.reference import topk_reference
from ..transpose_codes.operation import transpose_codes
from .checks import check_latents


def centred(x: torch.Tensor, pre_bias: torch.Tensor | None) -> torch.Tensor:
    """Return x - pre_bias in x's dtype; x itself without a pre_bias."""
    return x if pre_bias is None else (x - pre_bias).to(x.dtype)


def transposed(indices: torch.Tensor, n: int, transpose: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the transposition of the indices, or empty tensors unless `transpose`."""
    if transpose:
        return transpose_codes(indices, n)
    return indices.new_empty(0), indices.new_empty(0, dtype=torch.int32)


def linear_topk_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
    groups: int,
    relu: bool,
    sorted: bool,
    transpose: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_latents(latents, weight.shape[0])

    def selected(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if latents is None else tensor[latents]).to(x.dtype)

    scores = torch.nn.functional.linear(
        centred(x, pre_bias), selected(weight), None if bias is None else selected(bias)
    )
    if scale is not None:
        scores = scores * selected(scale)
    grouped = scores.view(*scores.shape[:-1], groups, scores.shape[-1] // groups)
    values, indices, _ = topk_reference(grouped, k // groups, sorted, relu, False, False)
    indices = indices + torch.arange(groups, device=x.device).unsqueeze(1) * grouped.shape[-1]
    values, indices = values.flatten(-2), indices.flatten(-2)
    if latents is not None:
        indices = latents[indices]
    return values, indices, *transposed(indices, weight.shape[0], transpose)
