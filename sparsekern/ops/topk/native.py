"""Calls of the native top-k kernels, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import DTYPE_TAGS, launch, new_output, pointer, workspace

SORTED, RELU, ABS = 1, 2, 4


def topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, n] of any strides or [..., n] contiguous -> values [..., k], indices int64 [..., k],
    counts int64 [n] or [0]."""
    return _select(x, k, sorted * SORTED + relu * RELU + abs * ABS, None, count)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, n] of any strides or [..., n] contiguous -> masked [..., n] and the codes behind it,
    in ascending index order."""
    masked = new_output(x, *x.shape)
    return masked, *_select(x, k, relu * RELU + abs * ABS, masked, count)


def _select(
    x: torch.Tensor, k: int, flags: int, masked: torch.Tensor | None, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.dim() == 2:
        rows, n = x.shape
        strides, shape = x.stride(), (rows, k)
    else:
        n = x.shape[-1]
        rows, strides, shape = x.numel() // n, (n, 1), (*x.shape[:-1], k)
    tag = DTYPE_TAGS[x.dtype]
    values = x.new_empty(*shape)
    indices = x.new_empty(*shape, dtype=torch.int64)
    counts = indices.new_zeros(n) if count else indices.new_empty(0)
    scratch = workspace("topk_workspace", x, rows, n, k, tag)
    launch(
        "topk",
        x,
        x.data_ptr(),
        tag,
        rows,
        n,
        *strides,
        k,
        flags,
        values.data_ptr(),
        indices.data_ptr(),
        pointer(masked),
        counts.data_ptr() if count else 0,
        pointer(scratch),
    )
    return values, indices, counts
