"""Checks of the arguments of sparse_matmul and its gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_codes, check_floating, check_like, check_same_device, check_weight_dtype
from ..transpose_codes.checks import check_grouping


def check_dictionary(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check dtypes, shapes and devices of values, weight and bias."""
    op = "sparse_matmul"
    check_floating(op, "values", values)
    check_floating(op, "weight", weight)
    if bias is not None:
        check_floating(op, "bias", bias)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight must be [latents, features], got shape {list(weight.shape)}"
        )
    check_same_device(op, values=values, weight=weight, bias=bias)
    check_weight_dtype(op, values, weight, "values", "values'", "16-bit values")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"{op}: bias must be [{weight.shape[1]}], got {list(bias.shape)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}")


def check_product(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Check the arguments of the operation, as torch.ops passes them."""
    check_codes("sparse_matmul", values, indices)
    check_dictionary(values, weight, bias)
    if offsets is not None and positions is not None:
        check_grouping("sparse_matmul", offsets, positions, indices, weight.shape[0])


def check_gradients(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, *_: Any
) -> None:
    """Check the arguments of the gradients, as torch.ops passes them."""
    check_product(values, indices, weight, None)
    check_like("sparse_matmul", "grad", grad, values, (*values.shape[:-1], weight.shape[1]))
