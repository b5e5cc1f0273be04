"""Calls of the native batch normalisation, for the CPU."""

from __future__ import annotations

import torch

from ...dispatch.launch import channel_tensor, launch, new_output, pointer


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return z like x, mean and variance [C] of x [outer, C, inner].

    All are contiguous; weight, bias, mean and variance are in `wide`, the dtype of sums over x.
    """
    outer, channels, inner = x.shape
    z = new_output(x, outer, channels, inner)
    mean, var = x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)
    launch(
        "batch_norm",
        x,
        x=channel_tensor(x),
        weight=pointer(weight),
        bias=pointer(bias),
        eps=eps,
        z=z.data_ptr(),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
    )
    return z, mean, var


def batch_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight and bias for grad and x [outer, C, inner] of one dtype.

    All are contiguous; the others are [C] in the dtype of sums over x.
    """
    outer, channels, inner = x.shape
    grad_x = new_output(x, outer, channels, inner)
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    launch(
        "batch_norm_backward",
        x,
        grad=grad.data_ptr(),
        x=channel_tensor(x),
        weight=pointer(weight),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
        eps=eps,
        grad_x=grad_x.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
    )
    return grad_x, grad_weight, grad_bias
