"""Calls of the native sparse 1x1 convolution, for the CPU and for CUDA.

The kernels of the CPU take the codes in any order. Those of CUDA need the codes of a site, or of a
channel, next to each other, so the codes are grouped here. The sort is stable, so sums keep their
order.
"""

from __future__ import annotations

import torch

from ...dispatch.launch import codes, launch, matrix, module_for, new_output, pointer
from ..channels import channels_of
from ..checks import in_range


def pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """Return out [outer, E, inner] of values and indices [M].

    weight is [E, C] of any strides, bias [E] of its dtype.
    """
    outputs, channels = weight.shape
    if _needs_grouped_codes(values):
        sites = indices.long() // max(channels * inner, 1) * inner + indices % max(inner, 1)
        order = _order_by_key(sites, outer * inner, indices, outer * channels * inner)
        values, indices = values[order], indices[order]
    out = new_output(values, outer, outputs, inner)
    launch(
        "pointwise_conv",
        values,
        codes=codes(values, indices),
        outer=outer,
        inner=inner,
        weight=matrix(weight),
        bias=pointer(bias),
        out=out.data_ptr(),
    )
    return out


def pointwise_conv_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of values [M], weight [E, C] and bias [E].

    grad is [outer, E, inner], contiguous.
    """
    outer, outputs, inner = grad.shape
    channels = weight.shape[1]
    order = None
    if _needs_grouped_codes(values):
        code_channels = channels_of(indices.long(), max(channels, 1), max(inner, 1))
        order = _order_by_key(code_channels, channels, indices, outer * channels * inner)
        values, indices = values[order], indices[order]
    grad_values = torch.empty_like(values)
    grad_weight = weight.new_empty(outputs, channels)
    grad_bias = weight.new_empty(outputs)
    launch(
        "pointwise_conv_backward",
        grad,
        grad=grad.data_ptr(),
        codes=codes(values, indices),
        outer=outer,
        inner=inner,
        weight=matrix(weight),
        grad_values=grad_values.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
    )
    if order is not None:
        grad_values = torch.empty_like(grad_values).scatter_(0, order, grad_values)
    return grad_values, grad_weight, grad_bias


def _needs_grouped_codes(values: torch.Tensor) -> bool:
    return getattr(module_for(values), "GROUPED_CODES", False)


def _order_by_key(keys: torch.Tensor, limit: int, indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return the order of the codes by ascending key below `limit`, stable for equal keys.

    Codes whose index lies outside 0..size-1 come last.
    """
    keys = torch.where(in_range(indices, size), keys, limit)
    if limit < 2**31:  # half as many passes of a radix sort
        keys = keys.int()
    return keys.argsort(stable=True)
