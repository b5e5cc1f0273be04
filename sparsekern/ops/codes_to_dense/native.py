"""Calls of the native kernel of codes_to_dense, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import DTYPE_TAGS, launch, new_output


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """values [rows, k], indices int64 [rows, k], unique within a row -> dense [rows, n]."""
    rows, k = values.shape
    dense = new_output(values, rows, n)
    launch(
        "codes_to_dense",
        values,
        values.data_ptr(),
        DTYPE_TAGS[values.dtype],
        indices.data_ptr(),
        rows,
        k,
        n,
        dense.data_ptr(),
    )
    return dense
