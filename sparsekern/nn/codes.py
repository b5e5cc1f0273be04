"""Codes of rows that keep different numbers of latents."""

from __future__ import annotations

import torch

from ..dispatch.transforms import traced_or_vmapped
from ..ops.codes import Codes
from ..ops.topk import topk


def codes_where(dense: torch.Tensor, mask: torch.Tensor) -> Codes:
    """Return the elements of dense [..., n] in a mask (bool [..., n]) as codes of one width.

    The width K is the largest number of elements in a row of the mask, at least 1, for which the
    host waits. Under tracing and vmap, where it must suit other inputs as well, it is n. A row with
    fewer elements is filled with its first others, which must be zero.

    Returns:
        values [..., K], differentiable with respect to dense, and indices int64 [..., K], ascending
        and unique in a row.
    """
    if traced_or_vmapped():
        width = dense.shape[-1]
    else:
        width = int(mask.sum(-1).max()) if mask.numel() else 0
    indices = topk(mask.to(dense.dtype), max(width, 1), sorted=False).indices
    return Codes(dense.gather(-1, indices), indices)
