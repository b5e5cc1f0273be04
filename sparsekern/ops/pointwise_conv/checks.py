"""Checks of the arguments of pointwise_conv and its gradients."""

from __future__ import annotations

import math

import torch

from ..checks import (
    check_codes,
    check_floating,
    check_like,
    check_same_device,
    check_size,
    check_weight_dtype,
)


def checked_weight(
    op: str, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channels: int
) -> torch.Tensor:
    """Check weight and bias against the values; return the weight as [E, C]."""
    check_floating(op, "weight", weight)
    if weight.dim() < 2 or weight.shape[1] != channels or math.prod(weight.shape[2:]) != 1:
        raise ValueError(
            f"{op}: weight must have shape [E, {channels}] or [E, {channels}, 1, ...] ({channels} "
            f"channels), got {list(weight.shape)}"
        )
    check_weight_dtype(op, values, weight, "values", "values'", "16-bit values")
    if bias is not None:
        check_floating(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must have shape [{weight.shape[0]}] (the rows of weight), got "
                f"{list(bias.shape)}"
            )
    check_same_device(op, values=values, weight=weight, bias=bias)
    return weight.flatten(1)


def check_product(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> None:
    """Check the arguments of the operation, as torch.ops passes them."""
    op = "pointwise_conv"
    check_codes(op, values, indices)
    if values.dim() != 1 or weight.dim() != 2:
        raise ValueError(
            f"{op}: values must be [M] and weight [E, C], got {list(values.shape)} and "
            f"{list(weight.shape)}"
        )
    checked_weight(op, values, weight, bias, weight.shape[1])
    check_size(op, "outer", outer)
    check_size(op, "inner", inner)


def check_gradients(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> None:
    """Check the arguments of the gradient, as torch.ops passes them."""
    if grad.dim() != 3:
        raise ValueError(f"pointwise_conv: grad must be [outer, E, inner], got {list(grad.shape)}")
    outer, _, inner = grad.shape
    check_product(values, indices, weight, None, outer, inner)
    check_like("pointwise_conv", "grad", grad, values, (outer, weight.shape[0], inner))
