"""The excess of elements over the threshold of their channel, as a tensor or as codes.

Definition, for a tensor x with channels c:

    threshold_relu(x, t)[.., c, ..] = max(z - t_c, 0),   z = x * scale_c + shift_c

An element counts as active unless z <= t_c; so a NaN is active, and stays NaN.

Gradient: thresholds are constants. dx = dy * scale_c where active, else 0; dscale_c and dshift_c
are the sums of dy * x and dy over the active elements of a channel.

Source: Gupta et al., Sparling (arXiv 2302.01976), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..exported import exported
from . import operation
from .checks import check_threshold

__all__ = ["ChannelCodes", "threshold_codes", "threshold_relu"]


@exported("sparsekern.ops.threshold_relu.ChannelCodes")
class ChannelCodes(NamedTuple):
    """The active elements of a tensor with channels, in ascending order of their index."""

    values: torch.Tensor
    """[M], by how much they exceed the threshold of their channel."""
    indices: torch.Tensor
    """int64 [M], flat, as in the contiguous tensor."""
    counts: torch.Tensor
    """int64 [C], the active elements of each channel."""


def threshold_relu(
    x: torch.Tensor,
    threshold: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by how much elements exceed the threshold of their channel, else 0, and their counts.

    Equivalent PyTorch for x [B, C, ...] without scale and shift::

        y = (x - threshold.view(-1, *[1] * (x.dim() - 2))).relu()
        counts = (y > 0).transpose(0, 1).flatten(1).sum(1)

    Args:
        x: floating point with at least one dimension; any strides.
        threshold: [C] floating point, taken as a constant.
        scale: [C], factors of x before it is compared, as of a normalisation in evaluation mode;
            needs shift.
        shift: [C], added to x after that; needs scale.
        channel_dim: which dimension holds the channels.

    Returns:
        y of x's shape and dtype, differentiable with respect to x, scale and shift; counts int64
        [C] of the active elements.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices do not fit, or only one of scale and shift is given.

    Note:
        Computed in float32 (float64 for float64) and rounded once.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.threshold_relu(torch.tensor([[1.0, 4.0]]), torch.tensor([2.0, 3.0]))
        (tensor([[0., 1.]]), tensor([0, 1]))
    """
    dim, threshold = check_threshold("threshold_relu", x, threshold, scale, shift, channel_dim)
    y, counts = operation.threshold_relu(x, threshold, scale, shift, dim)
    return y, counts


def threshold_codes(
    x: torch.Tensor,
    threshold: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    channel_dim: int = 1,
) -> ChannelCodes:
    """Return the elements of :func:`threshold_relu` that are active, without the zeros around them.

    Equivalent PyTorch::

        y, counts = sparsekern.threshold_relu(x, threshold)
        indices = y.flatten().nonzero().flatten()
        values = y.flatten()[indices]

    Arguments and errors are those of :func:`threshold_relu`; values are differentiable with respect
    to x, scale and shift.

    Note:
        The number of codes depends on the data, so on a GPU the host waits for it, and
        torch.compile(fullgraph=True) needs torch._dynamo.config.capture_dynamic_output_shape_ops.

    Example:
        >>> import torch, sparsekern
        >>> x = torch.tensor([[1.0, 4.0], [5.0, 2.0]])
        >>> sparsekern.threshold_codes(x, torch.tensor([2.0, 3.0])).indices
        tensor([1, 2])
    """
    dim, threshold = check_threshold("threshold_codes", x, threshold, scale, shift, channel_dim)
    return ChannelCodes(*operation.threshold_codes(x, threshold, scale, shift, dim))
