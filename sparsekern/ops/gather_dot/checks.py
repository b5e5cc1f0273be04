"""Checks of the arguments of gather_dot."""

from __future__ import annotations

import torch

from ..checks import check_codes, check_floating, check_same_device, check_weight_dtype
from ..transpose_codes.checks import check_grouping


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Check dtypes, shapes and devices, as the public function and torch.ops pass them."""
    op = "gather_dot"
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    check_codes(op, None, indices)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [latents, {x.shape[-1]}] for x {list(x.shape)}, "
            f"got shape {list(weight.shape)}"
        )
    if indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: indices must be [{''.join(f'{size}, ' for size in x.shape[:-1])}k] for x "
            f"{list(x.shape)}, "
            f"got shape {list(indices.shape)}"
        )
    check_same_device(op, x=x, weight=weight, indices=indices)
    check_weight_dtype(op, x, weight, "x", "x's", "a 16-bit x")
    if offsets is not None and positions is not None:
        check_grouping(op, offsets, positions, indices, weight.shape[0])
