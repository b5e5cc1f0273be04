"""Calls of the native kernels of channel_threshold, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import DTYPE_TAGS, launch, pointer, workspace


def channel_threshold(x: torch.Tensor, rank: int) -> torch.Tensor:
    """x [outer, C, inner], contiguous -> the rank-th smallest of each channel [C]."""
    outer, channels, inner = x.shape
    tag = DTYPE_TAGS[x.dtype]
    out = x.new_empty(channels)
    scratch = workspace("channel_threshold_workspace", x, outer, channels, inner, rank, tag)
    launch(
        "channel_threshold",
        x,
        x.data_ptr(),
        tag,
        outer,
        channels,
        inner,
        rank,
        out.data_ptr(),
        pointer(scratch),
    )
    return out
