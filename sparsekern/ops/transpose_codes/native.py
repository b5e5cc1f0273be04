"""Calls of the native counting sort of codes, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import index_list, launch
from ..checks import bad_index


def transpose_codes(
    indices: torch.Tensor, n: int, op: str = "transpose_codes"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return offsets int64 [n + 1] and positions int32 [codes] of contiguous indices.

    op: the operation that errors name.
    """
    count = indices.numel()
    if count >= 2**31:
        raise ValueError(
            f"{op}: one call takes fewer than 2^31 codes to transpose, got {count}; split the batch"
        )
    offsets = indices.new_empty(n + 1, dtype=torch.int64)
    positions = indices.new_empty(count, dtype=torch.int32)
    wrong = launch(
        "transpose_codes",
        indices,
        indices=index_list(indices),
        n=n,
        offsets=offsets.data_ptr(),
        positions=positions.data_ptr(),
    )
    if wrong >= 0:
        raise bad_index(op, indices, wrong, n)
    return offsets, positions
