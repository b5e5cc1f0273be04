"""The torch operation pointwise_conv: shapes, gradients, batches, autocast, and its kernels."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.operations import define, differentiating
from ..batching import one_by_one
from ..checks import check_range, places_in_range
from . import native
from .checks import check_gradients, check_product
from .reference import pointwise_conv_backward_reference, pointwise_conv_reference


def _native(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    check_range("pointwise_conv", indices, outer * weight.shape[1] * inner)
    return native.pointwise_conv(
        values.contiguous(),
        indices.contiguous(),
        weight,
        None if bias is None else bias.to(weight.dtype).contiguous(),
        outer,
        inner,
    )


def _native_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer, _, inner = grad.shape
    # Checked again: indices may have changed since the forward pass.
    check_range("pointwise_conv", indices, outer * weight.shape[1] * inner)
    return native.pointwise_conv_backward(
        grad.contiguous(), values.contiguous(), indices.contiguous(), weight
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, weight, bias, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, weight)


def _differentiable_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the reference's backward pass, which consists of differentiable operations."""
    if indices.is_cpu:
        return pointwise_conv_backward_reference(grad, values, indices, weight)
    inside, indices = places_in_range(indices, grad.shape[0] * weight.shape[1] * grad.shape[2])
    values = torch.where(inside, values, 0)
    grad_values, grad_weight, grad_bias = pointwise_conv_backward_reference(
        grad, values, indices, weight
    )
    return torch.where(inside, grad_values, 0), grad_weight, grad_bias


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    values, indices, weight = ctx.saved_tensors
    run = _differentiable_backward if differentiating() else pointwise_conv_backward
    grad_values, grad_weight, bias_sums = run(grad, values, indices, weight)
    grad_bias = None if ctx.bias_dtype is None else bias_sums.to(ctx.bias_dtype)
    return grad_values, None, grad_weight, grad_bias, None, None


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    return values.new_empty(outer, weight.shape[0], inner)


def _fake_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_weight = weight.new_empty(weight.shape)
    return torch.empty_like(values), grad_weight, weight.new_empty(weight.shape[0])


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *sizes = args
    if torch.float64 in (values.dtype, weight.dtype):  # as in torch's convolutions
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return values.to(dtype), indices, weight, bias, *sizes


pointwise_conv = define(
    "pointwise_conv",
    "(Tensor values, Tensor indices, Tensor weight, Tensor? bias, SymInt outer, SymInt inner)"
    " -> Tensor",
    reference=pointwise_conv_reference,
    implementations={"native": _native},
    fake=_fake,
    check=check_product,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one,
    autocast=_autocast,
)
pointwise_conv_backward = define(
    "pointwise_conv_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight)"
    " -> (Tensor grad_values, Tensor grad_weight, Tensor grad_bias)",
    reference=pointwise_conv_backward_reference,
    implementations={"native": _native_backward},
    fake=_fake_backward,
    check=check_gradients,
    vmap=one_by_one,
)
