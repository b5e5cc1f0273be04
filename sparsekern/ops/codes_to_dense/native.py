"""Calls of the native kernel of codes_to_dense, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import codes, launch, new_output


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Return dense [rows, n] of values and indices int64 [rows, k], unique within a row."""
    dense = new_output(values, len(values), n)
    launch(
        "codes_to_dense",
        values,
        codes=codes(values, indices),
        n=n,
        dense=dense.data_ptr(),
    )
    return dense
