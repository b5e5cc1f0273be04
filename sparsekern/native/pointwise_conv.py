"""Calls of the native sparse 1x1 convolution, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from . import DTYPE_TAGS, INDEX_TAGS, launch, new_output, pointer, workspace


def pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """values, indices [M], weight [E, C] of any strides, bias [E] of its dtype -> out
    [outer, E, inner]."""
    outputs, channels = weight.shape
    out = new_output(values, outer, outputs, inner)
    scratch = workspace("pointwise_conv_workspace", values, len(values), outer, outputs, inner)
    launch(
        "pointwise_conv",
        values,
        values.data_ptr(),
        DTYPE_TAGS[values.dtype],
        indices.data_ptr(),
        INDEX_TAGS[indices.dtype],
        len(values),
        outer,
        channels,
        inner,
        weight.data_ptr(),
        DTYPE_TAGS[weight.dtype],
        outputs,
        weight.stride(0),
        weight.stride(1),
        pointer(bias),
        out.data_ptr(),
        pointer(scratch),
    )
    return out


def pointwise_conv_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [outer, E, inner] contiguous, values, indices [M], weight [E, C] -> gradients of values
    [M], weight [E, C] and bias [E]."""
    outer, outputs, inner = grad.shape
    channels = weight.shape[1]
    grad_values = torch.empty_like(values)
    grad_weight = weight.new_empty(outputs, channels)
    grad_bias = weight.new_empty(outputs)
    scratch = workspace(
        "pointwise_conv_backward_workspace", values, len(values), outer, channels, inner, outputs
    )
    launch(
        "pointwise_conv_backward",
        grad,
        grad.data_ptr(),
        DTYPE_TAGS[values.dtype],
        values.data_ptr(),
        indices.data_ptr(),
        INDEX_TAGS[indices.dtype],
        len(values),
        outer,
        channels,
        inner,
        weight.data_ptr(),
        DTYPE_TAGS[weight.dtype],
        outputs,
        weight.stride(0),
        weight.stride(1),
        grad_values.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        pointer(scratch),
    )
    return grad_values, grad_weight, grad_bias
