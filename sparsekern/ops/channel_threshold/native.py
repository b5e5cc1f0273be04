"""Calls of the native kernels of channel_threshold, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import channel_tensor, launch


def channel_threshold(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the rank-th smallest of each channel [C] of x [outer, C, inner], contiguous."""
    thresholds = x.new_empty(x.shape[1])
    launch(
        "channel_threshold",
        x,
        x=channel_tensor(x),
        rank=rank,
        thresholds=thresholds.data_ptr(),
    )
    return thresholds
