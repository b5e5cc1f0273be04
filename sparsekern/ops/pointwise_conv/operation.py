"""What torch knows of pointwise_conv: shapes, gradients, batches, autocast, and which
kernels serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define, differentiating
from ..batching import one_by_one
from ..checks import check_range
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
    # Again: they may have changed since the forward pass.
    check_range("pointwise_conv", indices, outer * weight.shape[1] * inner)
    return native.pointwise_conv_backward(
        grad.contiguous(), values.contiguous(), indices.contiguous(), weight
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, weight, bias, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    values, indices, weight = ctx.saved_tensors
    # The reference's backward pass consists of differentiable operations.
    twice = differentiating()
    run = pointwise_conv_backward_reference if twice else pointwise_conv_backward
    of_values, of_weight, of_bias = run(grad, values, indices, weight)
    of_bias = None if ctx.bias_dtype is None else of_bias.to(ctx.bias_dtype)
    return of_values, None, of_weight, of_bias, None, None


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
    of_weight = weight.new_empty(weight.shape)
    return torch.empty_like(values), of_weight, weight.new_empty(weight.shape[0])


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *sizes = args
    if torch.float64 in (values.dtype, weight.dtype):  # as torch's convolutions: left alone
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return values.to(dtype), indices, weight, bias, *sizes


pointwise_conv: Callable[..., Any] = define(
    "pointwise_conv",
    "(Tensor values, Tensor indices, Tensor weight, Tensor? bias, SymInt outer, SymInt inner)"
    " -> Tensor",
    reference=pointwise_conv_reference,
    implementations={"native": _native},
    fake=_fake,
    check=check_product,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one(lambda: pointwise_conv),
    autocast=_autocast,
)
pointwise_conv_backward: Callable[..., Any] = define(
    "pointwise_conv_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight)"
    " -> (Tensor grad_values, Tensor grad_weight, Tensor grad_bias)",
    reference=pointwise_conv_backward_reference,
    implementations={"native": _native_backward},
    fake=_fake_backward,
    check=check_gradients,
    vmap=one_by_one(lambda: pointwise_conv_backward),
)
