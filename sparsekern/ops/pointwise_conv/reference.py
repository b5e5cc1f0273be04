"""The definition of pointwise_conv and its gradients in torch."""

from __future__ import annotations

import torch

from ..channels import channels_of
from ..checks import check_range
from ..layout import sum_dtype


def _places(indices: torch.Tensor, channels: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel, and row of the output seen as [outer * inner, E], of each index."""
    indices = indices.long()
    return channels_of(indices, channels, inner), (
        indices // (channels * inner) * inner + indices % inner
    )


def pointwise_conv_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    outputs, channels = weight.shape
    check_range("pointwise_conv", indices, outer * channels * inner)
    kind = sum_dtype(values.dtype)
    found, rows = _places(indices, channels, inner)
    terms = values.to(kind).unsqueeze(1) * weight.to(kind).t()[found]
    out = terms.new_zeros(outer * inner, outputs).index_add(0, rows, terms)
    if bias is not None:
        out = out + bias.to(kind)
    out = out.view(outer, inner, outputs).transpose(1, 2)
    return out.to(values.dtype).contiguous()


def pointwise_conv_backward_reference(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer, _, inner = grad.shape
    outputs, channels = weight.shape
    check_range("pointwise_conv", indices, outer * channels * inner)
    kind = sum_dtype(values.dtype)
    found, rows = _places(indices, channels, inner)
    wide = grad.to(kind)
    at = wide.transpose(1, 2).flatten(0, 1)[rows]
    of_values = (at * weight.to(kind).t()[found]).sum(1).to(values.dtype)
    terms = at * values.to(kind).unsqueeze(1)
    of_weight = terms.new_zeros(channels, outputs).index_add(0, found, terms).t()
    return of_values, of_weight.to(weight.dtype).contiguous(), wide.sum((0, 2)).to(weight.dtype)
