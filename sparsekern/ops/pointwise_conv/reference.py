"""The definition of pointwise_conv and its gradients in torch."""

from __future__ import annotations

import torch

from ..channels import channels_of
from ..checks import check_range
from ..layout import sum_dtype


def _channels_and_rows(
    indices: torch.Tensor, channels: int, inner: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channel of each index, and its row in the output seen as [outer * inner, E]."""
    indices = indices.long()
    rows = indices // (channels * inner) * inner + indices % inner
    return channels_of(indices, channels, inner), rows


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
    dtype = sum_dtype(values.dtype)
    code_channels, rows = _channels_and_rows(indices, channels, inner)
    terms = values.to(dtype).unsqueeze(1) * weight.to(dtype).t()[code_channels]
    out = terms.new_zeros(outer * inner, outputs).index_add(0, rows, terms)
    if bias is not None:
        out = out + bias.to(dtype)
    out = out.view(outer, inner, outputs).transpose(1, 2)
    return out.to(values.dtype).contiguous()


def pointwise_conv_backward_reference(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer, _, inner = grad.shape
    outputs, channels = weight.shape
    check_range("pointwise_conv", indices, outer * channels * inner)
    dtype = sum_dtype(values.dtype)
    code_channels, rows = _channels_and_rows(indices, channels, inner)
    wide = grad.to(dtype)
    code_grads = wide.transpose(1, 2).flatten(0, 1)[rows]
    grad_values = (code_grads * weight.to(dtype).t()[code_channels]).sum(1).to(values.dtype)
    terms = code_grads * values.to(dtype).unsqueeze(1)
    grad_weight = terms.new_zeros(channels, outputs).index_add(0, code_channels, terms).t()
    grad_bias = wide.sum((0, 2))
    return grad_values, grad_weight.to(weight.dtype).contiguous(), grad_bias.to(weight.dtype)
