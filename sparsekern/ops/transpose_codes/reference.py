"""The definition of transpose_codes in torch."""

from __future__ import annotations

import torch

from ..checks import check_range


def transpose_codes_reference(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_range("transpose_codes", indices, n)
    latents, positions = indices.reshape(-1).sort(stable=True)
    bounds = torch.arange(n + 1, dtype=latents.dtype, device=indices.device)
    return torch.searchsorted(latents, bounds), positions.to(torch.int32)
