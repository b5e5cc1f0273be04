"""Batch normalisation with the statistics of the batch, for the CPU.

torch's is slow there with channels last. On GPUs torch's own is the right choice.

Definition, for x with channels c and n elements in each of them:

    mean_c = sum x / n,  var_c = sum (x - mean_c)^2 / n
    z = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c

Gradient, with g that of z and r_c = 1 / sqrt(var_c + eps):

    dbias_c = sum g,  dweight_c = r_c * sum g (x - mean_c)
    dx = weight_c r_c (g - dbias_c / n - (x - mean_c) r_c dweight_c / n)

Source: Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..dispatch import library
from .batching import one_by_one
from .channels import (
    across,
    channel_sum,
    check_channels,
    check_constants,
    constants,
    layout,
    placed_like,
)
from .checks import check_like
from .sparse_matmul import sum_dtype

LONG_RUN, FEW_CHANNELS = 64, 128


class Normalized(NamedTuple):
    """A normalised tensor and what it was normalised with."""

    tensor: torch.Tensor
    """Like x."""
    mean: torch.Tensor
    """[C], float32 (float64 for float64), a constant to the gradient."""
    var: torch.Tensor
    """[C], biased, likewise."""


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    channel_dim: int = 1,
) -> Normalized:
    """Return x with mean 0 and variance 1 in each channel, then scaled and shifted.

    Equivalent PyTorch for x [B, C, ...]::

        z = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    Args:
        x: floating point, not empty; any strides.
        weight, bias: [C], or None for ones and zeros.
        eps: added to the variance.
        channel_dim: which dimension holds the channels.

    Returns:
        z of x's shape and dtype, differentiable with respect to x, weight and bias, with the mean
        and the variance of each channel.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices do not fit, or x is empty.

    Note:
        Sums run in float32 over at most 1024 elements, then in float64, in an order that does not
        depend on the number of threads. Native kernels are for the CPU only.

    Example:
        >>> import torch
        >>> from sparsekern.ops import batch_norm
        >>> batch_norm(torch.tensor([[1.0], [5.0]]), eps=0.0)[:3]
        (tensor([[-1.],
                [ 1.]]), tensor([3.]), tensor([4.]))
    """
    op = "batch_norm"
    dim = check_channels(op, x, channel_dim)
    if x.numel() == 0:
        raise ValueError(f"{op}: x must not be empty, got shape {list(x.shape)}")
    check_constants(op, x, dim, weight=weight, bias=bias)
    return Normalized(*_batch_norm(x, weight, bias, eps, dim))


def quicker_than_torch(x: torch.Tensor, dim: int) -> bool:
    """Whether the kernels are quicker for x than torch's, as measured: with long runs of a channel,
    and with few channels that lie last in memory."""
    if x.device.type != "cpu":
        return False
    inner = math.prod(x.shape[dim + 1 :]) if x.is_contiguous() else 1  # see layout
    return inner >= LONG_RUN or (inner == 1 and x.shape[dim] <= FEW_CHANNELS)


# -- references ------------------------------------------------------------------------------------


def batch_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = sum_dtype(x.dtype)
    wide = x.to(kind)
    n = x.numel() // x.shape[channel_dim]

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(kind), x.dim(), channel_dim)

    def mean_of(tensor: torch.Tensor) -> torch.Tensor:
        return channel_sum(tensor, channel_dim) / n

    mean = mean_of(wide)
    mean = mean + mean_of(wide - spread(mean))  # a large sum is rounded by more than a small one
    away = wide - spread(mean)
    var = mean_of(away.square())
    z = away * spread((var + eps).rsqrt())
    if weight is not None:
        z = z * spread(weight)
    if bias is not None:
        z = z + spread(bias)
    return placed_like(z, x, channel_dim), mean, var


def batch_norm_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = x.numel() // x.shape[channel_dim]

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(mean.dtype), x.dim(), channel_dim)

    wide = grad.to(mean.dtype)
    root = (var + eps).rsqrt()
    standard = (x.to(mean.dtype) - spread(mean)) * spread(root)
    of_bias = channel_sum(wide, channel_dim)
    of_weight = channel_sum(wide * standard, channel_dim)
    of_x = (wide - spread(of_bias / n) - standard * spread(of_weight / n)) * spread(root)
    if weight is not None:
        of_x = of_x * spread(weight)
    return placed_like(of_x, x, channel_dim), of_weight, of_bias


# -- what torch.ops hands over ---------------------------------------------------------------------


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> None:
    dim = check_channels("batch_norm", x, channel_dim)
    if x.numel() == 0:
        raise ValueError(f"batch_norm: x must not be empty, got shape {list(x.shape)}")
    check_constants("batch_norm", x, dim, weight=weight, bias=bias)


def _check_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channel_dim: int,
) -> None:
    _check(x, weight, None, eps, channel_dim)
    check_like("batch_norm", "grad", grad, x, x.shape)
    for name, tensor in (("mean", mean), ("var", var)):
        size = (x.shape[channel_dim],)
        check_like("batch_norm", name, tensor, x.new_empty(0, dtype=sum_dtype(x.dtype)), size)


# -- implementations -------------------------------------------------------------------------------


def _native(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    placed = layout(x, channel_dim)
    kind = sum_dtype(x.dtype)
    z, mean, var = library.kernels("native", "batch_norm").batch_norm(
        placed.tensor, *constants(kind, weight, bias), eps, kind
    )
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
    alike = grad.movedim(channel_dim, -1) if placed.moved else grad
    of_x, of_weight, of_bias = library.kernels("native", "batch_norm").batch_norm_backward(
        alike.contiguous().view(placed.tensor.shape),
        placed.tensor,
        *constants(mean.dtype, weight, mean, var),
        eps,
    )
    return placed.restored(of_x), of_weight, of_bias


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, ctx.eps, ctx.dim = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.save_for_backward(x, weight, mean, var)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    x, weight, mean, var = ctx.saved_tensors
    run: Callable[..., Any] = _batch_norm_backward
    if library.differentiating():  # differentiable operations, from x on
        run = batch_norm_backward_reference
        mean, var = batch_norm_reference(x, None, None, ctx.eps, ctx.dim)[1:]
    of_x, *others = run(grad, x, weight, mean, var, ctx.eps, ctx.dim)
    of_weight, of_bias = (
        None if dtype is None else tensor.to(dtype)
        for tensor, dtype in zip(others, ctx.dtypes, strict=True)
    )
    return of_x, of_weight, of_bias, None, None


# -- shapes only -----------------------------------------------------------------------------------


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
    of_x = placed.restored(torch.empty_like(placed.tensor))
    return of_x, torch.empty_like(mean), torch.empty_like(mean)


_batch_norm: Callable[..., Any] = library.define(
    "batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt channel_dim)"
    " -> (Tensor z, Tensor mean, Tensor var)",
    reference=batch_norm_reference,
    implementations={"native": _native},
    cpu_only=True,
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one(lambda: _batch_norm),
)
_batch_norm_backward: Callable[..., Any] = library.define(
    "batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps,"
    " SymInt channel_dim) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=batch_norm_backward_reference,
    implementations={"native": _native_backward},
    cpu_only=True,
    fake=_fake_backward,
    check=_check_backward,
    vmap=one_by_one(lambda: _batch_norm_backward),
)
