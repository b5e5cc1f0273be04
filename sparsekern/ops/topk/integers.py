"""Top-k of integers, for which there are no kernels: by way of numbers that hold them exactly."""

from __future__ import annotations

import torch

from . import operation

# A type of floating point that holds every number of a type of integers.
EXACT_IN = {
    torch.uint8: torch.float32,
    torch.int8: torch.float32,
    torch.int16: torch.float32,
    torch.int32: torch.float64,
}


def integer_topk(
    x: torch.Tensor, k: int, largest: bool, sorted: bool, relu: bool, abs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [..., k] and indices int64 [..., k] of integers x [..., n], as `topk` does."""
    if x.dtype in EXACT_IN:
        numbers = x.to(EXACT_IN[x.dtype])
        indices = operation.topk(numbers, k, sorted, False, abs, False, not largest)[1]
    else:
        indices = _order(x, largest, abs)[..., :k]
        if not sorted:
            indices = indices.sort(dim=-1).values
    values = x.gather(-1, indices)
    return values.clamp(min=0) if relu else values, indices.contiguous()


def _order(x: torch.Tensor, largest: bool, abs: bool) -> torch.Tensor:
    """Return the indices of int64 x [..., n] in order."""
    if abs:  # the magnitude of the smallest number is none of the type's, but all are below zero
        return torch.where(x > 0, -x, x).sort(dim=-1, descending=not largest, stable=True).indices
    return x.sort(dim=-1, descending=largest, stable=True).indices
