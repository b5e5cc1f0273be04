"""Calls of the native kernels of threshold_relu and threshold_codes, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import channel_tensor, launch, new_output, pointer

# The first call has room for one code per so many elements. If more are active, a second call has
# room for all.
ELEMENTS_PER_CODE = 64
LEAST_CAPACITY = 1024


def threshold_relu(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y like x and counts int64 [C] for x [outer, C, inner].

    All are contiguous; the constants are [C] in the dtype of sums over x.
    """
    y = new_output(x, *x.shape)
    counts = x.new_zeros(x.shape[1], dtype=torch.int64)
    launch(
        "threshold_relu",
        x,
        x=channel_tensor(x),
        threshold=threshold.data_ptr(),
        scale=pointer(scale),
        shift=pointer(shift),
        y=y.data_ptr(),
        counts=counts.data_ptr(),
    )
    return y, counts


def threshold_codes(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [M], flat indices int64 [M], ascending, and counts int64 [C].

    x is [outer, C, inner], the constants are [C] in the dtype of sums over x, all contiguous. The
    host waits for M.
    """
    channels = x.shape[1]
    capacity = min(x.numel(), max(LEAST_CAPACITY, x.numel() // ELEMENTS_PER_CODE))
    while True:
        values, indices = x.new_empty(capacity), x.new_empty(capacity, dtype=torch.int64)
        counts = x.new_zeros(channels, dtype=torch.int64)
        launch(
            "threshold_codes",
            x,
            x=channel_tensor(x),
            threshold=threshold.data_ptr(),
            scale=pointer(scale),
            shift=pointer(shift),
            capacity=capacity,
            values=values.data_ptr(),
            indices=indices.data_ptr(),
            counts=counts.data_ptr(),
        )
        count = int(counts.sum())
        if count <= capacity:
            return values[:count], indices[:count], counts
        capacity = count
