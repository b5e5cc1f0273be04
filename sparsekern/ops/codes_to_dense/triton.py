"""Codes written into a dense tensor, which torch fills with zeros first.

One program scatters SCATTER_BLOCK codes. Bound by the write of the zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv
from ..triton_keys import bits_of

# Codes one program of the dense scatter owns: 8 a thread.
SCATTER_BLOCK = 1024


@triton.jit
def scatter_kernel(values, indices, dense, total, k, n, BLOCK: tl.constexpr):
    """Set dense[b, indices[b, j]] = values[b, j]; one program owns BLOCK consecutive codes."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < total
    latents = tl.load(indices + entries, mask=inside, other=-1).to(tl.int64)
    bits = tl.load(values + entries, mask=inside, other=0)
    valid = (latents >= 0) & (latents < n)
    tl.store(dense + entries // k * n + latents, bits, mask=valid)


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Return dense [rows, n] of contiguous codes [rows, k] but for indices outside 0..n-1."""
    rows, k = values.shape
    dense = torch.zeros(rows, n, dtype=values.dtype, device=values.device)
    integer = bits_of(values.dtype).integer
    total = values.numel()
    if total:
        with device_of(values):
            scatter_kernel[(cdiv(total, SCATTER_BLOCK),)](
                values.view(integer),
                indices,
                dense.view(integer),
                total,
                k,
                n,
                BLOCK=SCATTER_BLOCK,
                num_warps=4,
            )
    return dense
