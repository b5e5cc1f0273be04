"""Calls of the native top-k kernels, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import launch, matrix, new_output, pointer


def topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [..., k], indices int64 [..., k] and counts int64 [n], or [0] without count.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    return _select(x, k, sorted, relu, abs, None, count)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return masked [..., n], and its codes and counts as `topk` does, by ascending index.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    masked = new_output(x, *x.shape)
    return masked, *_select(x, k, False, relu, abs, masked, count)


def _select(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    masked: torch.Tensor | None,
    count: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *batch, n = x.shape
    values = x.new_empty(*batch, k)
    indices = x.new_empty(*batch, k, dtype=torch.int64)
    counts = indices.new_zeros(n) if count else indices.new_empty(0)
    launch(
        "topk",
        x,
        x=matrix(x),
        k=k,
        sorted=sorted,
        relu=relu,
        abs=abs,
        values=values.data_ptr(),
        indices=indices.data_ptr(),
        masked=pointer(masked),
        counts=counts.data_ptr() if count else 0,
    )
    return values, indices, counts
