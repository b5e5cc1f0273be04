"""The 1x1 convolution of a tensor of which few elements are not zero, given as codes.

Definition, with the tensor as [outer, C, inner] (see ops/channels.py), codes (v_m, i_m) that stand
at outer o_m, channel c_m, inner s_m, and weight [E, C]:

    out[o, e, s] = bias[e] + sum over m with o_m = o, s_m = s of v_m * weight[e, c_m]

Gradient, with g that of out:

    dv_m = sum_e g[o_m, e, s_m] * weight[e, c_m]
    dweight[e, c] = sum over m with c_m = c of v_m * g[o_m, e, s_m]
    dbias[e] = sum over o, s of g[o, e, s]

Source: the definition of a convolution. Sums run over ascending m; accumulated in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..channels import check_channel_dim
from ..checks import check_codes
from . import operation
from .checks import checked_weight
from .dense import dense_pointwise_conv, dense_wins

__all__ = ["pointwise_conv"]


def pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    channel_dim: int = 1,
) -> torch.Tensor:
    """Return the 1x1 convolution of a tensor that is zero but for a few elements.

    Equivalent PyTorch for shape [B, C, H, W]::

        x = torch.zeros(shape).flatten().index_add(0, indices, values).view(shape)
        out = torch.nn.functional.conv2d(x, weight.view(-1, C, 1, 1), bias)

    Args:
        values: [M], the elements that are not zero, such as those of :func:`threshold_codes`.
        indices: [M] int64 or int32, their flat indices into the contiguous tensor. An index may
            occur more than once: its values add up.
        shape: of the tensor.
        weight: [E, C] or [E, C, 1, ...], in values' dtype or float32; any strides.
        bias: [E].
        channel_dim: which dimension of the tensor holds the channels.

    Returns:
        The tensor's shape with E channels instead of C, of values' dtype; differentiable with
        respect to values, weight and bias.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes or devices do not fit.
        IndexError: an index is outside the tensor (on the CPU; elsewhere only with
            SPARSEKERN_DEBUG=1).

    Note:
        Costs one write of the output, and E multiplications per code. On the CPU, from one code per
        16 elements of the tensor on, a dense convolution takes over. (Measured, forward and
        backward: it is faster from one in 30 on with small tensors, from one in 4 with large ones.)

    Example:
        >>> import torch, sparsekern
        >>> values, indices = torch.tensor([2.0]), torch.tensor([1])
        >>> sparsekern.pointwise_conv(values, indices, (1, 1, 3), torch.ones(1, 1)).tolist()
        [[[0.0, 2.0, 0.0]]]
    """
    op = "pointwise_conv"
    check_codes(op, values, indices)
    if values.dim() != 1:
        raise ValueError(f"{op}: values must have shape [M], got {list(values.shape)}")
    shape = tuple(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"{op}: shape must have no size below 0, got {list(shape)}")
    dim = check_channel_dim(op, "shape", len(shape), channel_dim)
    weight = checked_weight(op, values, weight, bias, shape[dim])
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    run = dense_pointwise_conv if dense_wins(values, math.prod(shape)) else operation.pointwise_conv
    out = run(values, indices, weight, bias, outer, inner)
    out = out.view(*shape[:dim], weight.shape[0], *shape[dim + 1 :])
    # A view that is made while nothing is recorded must not be changed in place later.
    return out if torch.is_grad_enabled() else out.detach()
