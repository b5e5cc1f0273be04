"""The transposition by torch's sort, in the place of a Triton kernel."""

from __future__ import annotations

import torch


def transpose_codes(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return offsets int64 [n + 1] and entries int32 [rows * k], the codes grouped by latent.

    entries[offsets[i] : offsets[i + 1]] are the flat positions with index i, ascending. Indices
    outside 0..n-1 lie before offsets[0] or behind offsets[n].
    """
    # 32-bit keys halve the passes of the radix sort; clamped first, so that none wraps around.
    latents, entries = indices.reshape(-1).clamp(-1, n).to(torch.int32).sort(stable=True)
    bounds = torch.arange(n + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(latents, bounds), entries.to(torch.int32)
