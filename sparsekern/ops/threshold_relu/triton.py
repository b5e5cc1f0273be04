"""The excess of elements over the threshold of their channel.

A tensor is [outer, C, inner]; a channel consists of `outer` runs of `inner` neighbours. One program
of `threshold_relu_kernel` owns a tile of runs, or of rows of all channels where runs are short, and
adds its counts per channel to the others'. Bound by one read and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two

# Elements of a tile, and the least length of runs that fill the lanes of its rows.
TILE = 4096
LONG_RUN = 16


@triton.jit
def threshold_relu_kernel(
    x,  # [rows, columns]: the runs, or all channels side by side
    threshold,  # [C] float32
    scale,  # [C] float32, when NORMALIZED
    shift,  # [C] float32, when NORMALIZED
    y,  # [rows, columns]
    counts,  # [C] int64
    rows,
    columns,
    channels,
    inner,
    NORMALIZED: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write y = z - t_c unless z <= t_c, else 0, with z = x * scale_c + shift_c; count these."""
    side = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // side).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % side).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    channel = row % channels if RUNS else column // inner
    there = row < rows if RUNS else column < columns
    axis: tl.constexpr = 1 if RUNS else 0

    where = (row * columns)[:, None] + column[None, :]
    z = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    t = tl.expand_dims(tl.load(threshold + channel, mask=there, other=0.0), axis)
    if NORMALIZED:
        factor = tl.load(scale + channel, mask=there, other=0.0)
        z = z * tl.expand_dims(factor, axis)
        z = z + tl.expand_dims(tl.load(shift + channel, mask=there, other=0.0), axis)

    active = inside & ((z <= t) == 0)  # holds for NaN
    excess = tl.where(active, z - t, 0.0)
    tl.store(y + where, excess.to(y.dtype.element_ty), mask=inside)
    found = tl.sum(active.to(tl.int32), axis=axis).to(tl.int64)
    tl.atomic_add(counts + channel, found, mask=found > 0, sem="relaxed")


def tile_block(columns: int) -> tuple[int, int]:
    """Return rows and columns of one program of threshold_relu."""
    side = min(TILE, next_power_of_two(columns))
    return TILE // side, side


def threshold_relu(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y like x and counts int64 [C] for x [outer, C, inner].

    All are contiguous; the constants are float32 [C].
    """
    outer, channels, inner = x.shape
    y = torch.empty_like(x)
    counts = torch.zeros(channels, dtype=torch.int64, device=x.device)
    runs = inner >= LONG_RUN
    rows, columns = (outer * channels, inner) if runs else (outer, channels * inner)
    block_rows, block_columns = tile_block(columns)
    with device_of(x):
        threshold_relu_kernel[(cdiv(rows, block_rows) * cdiv(columns, block_columns),)](
            x,
            threshold,
            threshold if scale is None else scale,
            threshold if shift is None else shift,
            y,
            counts,
            rows,
            columns,
            channels,
            inner,
            NORMALIZED=scale is not None,
            RUNS=runs,
            ROWS=block_rows,
            COLUMNS=block_columns,
            num_warps=8,
        )
    return y, counts
