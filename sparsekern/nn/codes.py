"""Codes of rows that keep different numbers of latents."""

from __future__ import annotations

import torch

from ..dispatch.transforms import traced_or_vmapped
from ..ops.codes import Codes
from ..ops.topk import topk


def codes_where(dense: torch.Tensor, wanted: torch.Tensor) -> Codes:
    """The elements of dense [..., n] that are wanted (bool [..., n]), as codes of one width.

    The width K is the largest number wanted in a row, at least 1, for which the host waits; n where
    other numbers must fit, too (traced code, the entries of a vmap). A row that wants fewer is
    filled with its first other elements, which must be zero.

    Returns:
        values [..., K], differentiable with respect to dense, and indices int64 [..., K], ascending
        and unique in a row.
    """
    if traced_or_vmapped():
        width = dense.shape[-1]
    else:
        width = int(wanted.sum(-1).max()) if wanted.numel() else 0
    indices = topk(wanted.to(dense.dtype), max(width, 1), sorted=False).indices
    return Codes(dense.gather(-1, indices), indices)
