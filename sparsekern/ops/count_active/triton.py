"""Counts of how often each latent fired.

One program owns BLOCK consecutive codes: it reads their indices (and values) once, coalesced, and
adds one to the counter of each code that fired. Bound by the atomic additions in the L2 cache;
sums of integers do not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv

# Codes a program owns: 8 a thread with 4 warps, enough loads in flight to hide the latency of the
# atomics.
BLOCK = 1024


@triton.jit
def count_active_kernel(
    indices, values, counts, total, n, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add #{ e : indices[e] = i and values[e] != 0 } to counts[i]; NaN is not zero."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < total

    latents = tl.load(indices + entries, mask=inside, other=-1).to(tl.int64)
    fired = (latents >= 0) & (latents < n)
    if HAS_VALUES:
        # Widened first: the interpreter holds bfloat16 as bare bits.
        fired = fired & (tl.load(values + entries, mask=inside, other=0.0).to(tl.float32) != 0.0)

    ones = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(counts + latents, ones, mask=fired, sem="relaxed")


def count_active(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    """Return counts int64 [n] of contiguous indices [count] and values [count] or None.

    Indices outside 0..n-1 are left out. 16-bit values are compared in float32, which is exact.
    """
    counts = torch.zeros(n, dtype=torch.int64, device=indices.device)
    total = indices.numel()
    if total == 0:
        return counts
    with device_of(indices):
        count_active_kernel[(cdiv(total, BLOCK),)](
            indices,
            indices if values is None else values,
            counts,
            total,
            n,
            HAS_VALUES=values is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return counts
