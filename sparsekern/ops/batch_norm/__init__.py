"""Batch normalisation with the statistics of the batch, for the CPU.

torch's is slow there with channels last. On GPUs torch's own is the right choice.

Definition, for x with channels c and n elements in each of them:

    mean_c = sum x / n,  var_c = sum (x - mean_c)^2 / n
    z = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c

Gradient, with g that of z and r_c = 1 / sqrt(var_c + eps):

    dbias_c = sum g,  dweight_c = r_c * sum g (x - mean_c)
    dx = weight_c r_c (g - dbias_c / n - (x - mean_c) r_c dweight_c / n)

Source: Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import operation
from .checks import check_batch

__all__ = ["Normalized", "batch_norm", "quicker_than_torch"]


LONG_RUN, FEW_CHANNELS = 64, 128


class Normalized(NamedTuple):
    """A normalised tensor and what it was normalised with."""

    tensor: torch.Tensor
    """Like x."""
    mean: torch.Tensor
    """[C], float32 (float64 for float64), a constant to the gradient."""
    var: torch.Tensor
    """[C], biased; dtype and gradient as for the mean."""


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    channel_dim: int = 1,
) -> Normalized:
    """Return x with mean 0 and variance 1 in each channel, then scaled and shifted.

    Equivalent PyTorch for x [B, C, ...]::

        z = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    Args:
        x: floating point, not empty; any strides.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the variance.
        channel_dim: which dimension holds the channels.

    Returns:
        z of x's shape and dtype, differentiable with respect to x, weight and bias, with the mean
        and the variance of each channel.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices do not fit, or x is empty.

    Note:
        Sums run in float32 over at most 1024 elements, then in float64, in an order that does not
        depend on the number of threads. Native kernels are for the CPU only.

    Example:
        >>> import torch
        >>> from sparsekern.ops import batch_norm
        >>> batch_norm(torch.tensor([[1.0], [5.0]]), eps=0.0)[:3]
        (tensor([[-1.],
                [ 1.]]), tensor([3.]), tensor([4.]))
    """
    dim = check_batch(x, weight, bias, eps, channel_dim)
    return Normalized(*operation.batch_norm(x, weight, bias, eps, dim))


def quicker_than_torch(x: torch.Tensor, dim: int) -> bool:
    """Return True where the kernels were measured to be quicker for x than torch's.

    That is with long runs of a channel, and with few channels that lie last in memory.
    """
    if x.device.type != "cpu":
        return False
    inner = math.prod(x.shape[dim + 1 :]) if x.is_contiguous() else 1  # see layout
    return inner >= LONG_RUN or (inner == 1 and x.shape[dim] <= FEW_CHANNELS)
