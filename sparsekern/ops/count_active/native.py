"""Calls of the native counting kernel, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import codes, launch
from ..checks import bad_index, check_range


def count_active(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    """Return counts int64 [n] of indices [codes] and values [codes] or None, contiguous."""
    if indices.device.type != "cpu":
        check_range("count_active", indices, n)
    counts = indices.new_zeros(n, dtype=torch.int64)
    wrong = launch(
        "count_active",
        indices,
        codes=codes(values, indices),
        n=n,
        counts=counts.data_ptr(),
    )
    if wrong >= 0:
        raise bad_index("count_active", indices, wrong, n)
    return counts
