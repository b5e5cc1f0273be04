"""The torch operation batch_norm: shapes, gradient, batches, and the kernels that serve it."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.operations import define, differentiating
from ..batching import one_by_one
from ..channels import constants, layout
from ..layout import sum_dtype
from . import native
from .checks import check_batch, check_gradient
from .reference import batch_norm_backward_reference, batch_norm_reference


def _native(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    placed = layout(x, channel_dim)
    dtype = sum_dtype(x.dtype)
    weight, bias = constants(dtype, weight, bias)
    z, mean, var = native.batch_norm(placed.tensor, weight, bias, eps, dtype)
    return placed.restored(z), mean, var


def _native_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    placed = layout(x, channel_dim)
    placed_grad = grad.movedim(channel_dim, -1) if placed.moved else grad
    placed_grad = placed_grad.contiguous().view(placed.tensor.shape)
    weight, mean, var = constants(mean.dtype, weight, mean, var)
    grad_x, grad_weight, grad_bias = native.batch_norm_backward(
        placed_grad, placed.tensor, weight, mean, var, eps
    )
    return placed.restored(grad_x), grad_weight, grad_bias


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, ctx.eps, ctx.dim = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.save_for_backward(x, weight, mean, var)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    x, weight, mean, var = ctx.saved_tensors
    run = batch_norm_backward
    if differentiating():  # then every step from x on must be differentiable
        run = batch_norm_backward_reference
        mean, var = batch_norm_reference(x, None, None, ctx.eps, ctx.dim)[1:]
    grad_x, *others = run(grad, x, weight, mean, var, ctx.eps, ctx.dim)
    grad_weight, grad_bias = (
        None if dtype is None else tensor.to(dtype)
        for tensor, dtype in zip(others, ctx.dtypes, strict=True)
    )
    return grad_x, grad_weight, grad_bias, None, None


def _fake(
    x: torch.Tensor, weight: Any, bias: Any, eps: float, channel_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    placed = layout(x, channel_dim)
    mean = x.new_empty(x.shape[channel_dim], dtype=sum_dtype(x.dtype))
    return placed.restored(torch.empty_like(placed.tensor)), mean, torch.empty_like(mean)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: Any, mean: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    placed = layout(x, options[-1])
    grad_x = placed.restored(torch.empty_like(placed.tensor))
    return grad_x, torch.empty_like(mean), torch.empty_like(mean)


batch_norm = define(
    "batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt channel_dim)"
    " -> (Tensor z, Tensor mean, Tensor var)",
    reference=batch_norm_reference,
    implementations={"native": _native},
    cpu_only=True,
    fake=_fake,
    check=check_batch,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one,
)
batch_norm_backward = define(
    "batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps,"
    " SymInt channel_dim) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=batch_norm_backward_reference,
    implementations={"native": _native_backward},
    cpu_only=True,
    fake=_fake_backward,
    check=check_gradient,
    vmap=one_by_one,
)
