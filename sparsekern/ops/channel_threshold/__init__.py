"""The threshold that a given share of each channel exceeds.

Definition, for a tensor x with C channels and N elements in each (over batch and space):

    channel_threshold(x, density)[c] = the r-th smallest element of channel c,
                                       r = max(1, floor(N * (1 - density))), counted from 1

NaN ranks above +inf, as in torch.kthvalue; -0 equals +0, and a threshold is never -0. Thresholds
are constants: there is no gradient.

Source: Gupta et al., Sparling (arXiv 2302.01976), section 3; r as in the authors' public code.
"""

from __future__ import annotations

import numbers

import torch

from ..channels import check_channels
from . import operation

__all__ = ["channel_threshold", "check_density"]


def channel_threshold(x: torch.Tensor, density: float, *, channel_dim: int = 1) -> torch.Tensor:
    """Return the threshold that a given share of each channel's elements exceeds.

    Equivalent PyTorch, which copies and sorts::

        columns = x.movedim(channel_dim, -1).flatten(0, -2)
        rank = max(1, int(len(columns) * (1 - density)))
        thresholds = columns.kthvalue(rank, dim=0).values

    Args:
        x: floating point with any number of dimensions and at least one element per channel, such
            as [B, C, H, W]; any strides. Dense ones, channels first or last, are not copied.
        density: share above the threshold, above 0 and at most 1. At most ``N - rank`` elements of
            a channel exceed it: fewer where values are equal, none where N * density < 1.
        channel_dim: which dimension holds the channels; all others are pooled.

    Returns:
        [C] of x's dtype, an element of each channel; not differentiable.

    Raises:
        TypeError: x is not floating point, or density not a number.
        ValueError: density or channel_dim is out of range, or x has no elements.

    Note:
        Exact, and the same bits on every backend and thread count.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.channel_threshold(torch.arange(10.0).view(1, 2, 5), 0.4).tolist()
        [2.0, 7.0]
    """
    op = "channel_threshold"
    dim = check_channels(op, x, channel_dim)
    check_density(op, density)
    return operation.channel_threshold(x.detach(), _rank(op, x, density, dim), dim)


def check_density(op: str, density: float) -> None:
    """Check that density is a number above 0 and at most 1."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise TypeError(
            f"{op}: density must be a number, got {density!r} of type {type(density).__name__}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"{op}: density must be above 0 and at most 1, got {density}")


def _rank(op: str, x: torch.Tensor, density: float, dim: int) -> int:
    """Return the rank of the threshold among a channel's elements; the smallest has rank 1."""
    count = x.numel() // max(x.shape[dim], 1)
    if count < 1:
        raise ValueError(f"{op}: x must have elements in each channel, got shape {list(x.shape)}")
    return max(1, int(count * (1 - density)))
