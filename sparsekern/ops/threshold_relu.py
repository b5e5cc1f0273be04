"""What exceeds the threshold of its channel, as a tensor full of zeros or without them.

Definition, for a tensor x with channels c:

    threshold_relu(x, t)[.., c, ..] = max(z - t_c, 0),   z = x * scale_c + shift_c

An element counts as active unless z <= t_c; so a NaN is active, and stays NaN.

Gradient: thresholds are constants. dx = dy * scale_c where active, else 0; dscale_c and dshift_c
are the sums of dy * x and dy over the active elements of a channel.

Source: Gupta et al., Sparling (arXiv 2302.01976), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..dispatch import library
from .batching import each_entry, one_by_one
from .channels import (
    across,
    channel_sum,
    channels_of,
    check_channels,
    check_constants,
    constants,
    layout,
    placed_like,
)
from .exported import exported
from .sparse_matmul import sum_dtype


@exported("sparsekern.ops.threshold_relu.ChannelCodes")
class ChannelCodes(NamedTuple):
    """The active elements of a tensor with channels, in ascending order of their index."""

    values: torch.Tensor
    """[M], what they exceed the threshold of their channel by."""
    indices: torch.Tensor
    """int64 [M], flat, as in the contiguous tensor."""
    counts: torch.Tensor
    """int64 [C], how many each channel has."""


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
        scale, shift: [C], what x is multiplied by and then added before it is compared: a
            normalisation in evaluation mode. Both or neither.
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
    dim, threshold = _checked("threshold_relu", x, threshold, scale, shift, channel_dim)
    y, counts = _threshold_relu(x, threshold, scale, shift, dim)
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
    dim, threshold = _checked("threshold_codes", x, threshold, scale, shift, channel_dim)
    return ChannelCodes(*_threshold_codes(x, threshold, scale, shift, dim))


# -- checks ----------------------------------------------------------------------------------------


def _checked(
    op: str,
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[int, torch.Tensor]:
    """The dimension of the channels, and the threshold as a constant."""
    dim = check_channels(op, x, channel_dim)
    if (scale is None) != (shift is None):
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{op}: {given} needs {missing}, got {given} alone")
    check_constants(op, x, dim, threshold=threshold, scale=scale, shift=shift)
    return dim, threshold.detach()


def _check(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> None:
    """What torch.ops hands over."""
    _checked("threshold_relu", x, threshold, scale, shift, channel_dim)


# -- references ------------------------------------------------------------------------------------


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that the operations compute in."""
    return tensor.to(sum_dtype(tensor.dtype))


def _excess(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z - t, and where z is not <= t."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return across(tensor.to(wide(x).dtype), x.dim(), dim)

    z = wide(x)
    if scale is not None and shift is not None:
        z = z * spread(scale) + spread(shift)
    t = spread(threshold)
    return z - t, (z <= t).logical_not()


def threshold_relu_reference(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    excess, active = _excess(x, threshold, scale, shift, channel_dim)
    counts = channel_sum(active.long(), channel_dim)
    return placed_like(torch.where(active, excess, 0), x, channel_dim), counts


def threshold_codes_reference(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    excess, active = _excess(x, threshold, scale, shift, channel_dim)
    indices = active.reshape(-1).nonzero().view(-1)
    channels = x.shape[channel_dim]
    found = channels_of(indices, channels, math.prod(x.shape[channel_dim + 1 :]))
    counts = torch.bincount(found, minlength=channels)
    return excess.reshape(-1)[indices].to(x.dtype), indices, counts


# -- implementations -------------------------------------------------------------------------------


def _dense(backend: str) -> Any:
    def run(
        x: torch.Tensor,
        threshold: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        channel_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x.numel() == 0:
            return threshold_relu_reference(x, threshold, scale, shift, channel_dim)
        placed = layout(x, channel_dim)
        y, counts = library.kernels(backend, "threshold").threshold_relu(
            placed.tensor, *constants(sum_dtype(x.dtype), threshold, scale, shift)
        )
        return placed.restored(y), counts

    return run


def _compacted(backend: str) -> Any:
    def run(
        x: torch.Tensor,
        threshold: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        channel_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if x.numel() == 0:
            return threshold_codes_reference(x, threshold, scale, shift, channel_dim)
        placed = layout(x, channel_dim)
        values, indices, counts = library.kernels(backend, "threshold").threshold_codes(
            placed.tensor, *constants(sum_dtype(x.dtype), threshold, scale, shift)
        )
        if placed.moved:  # from places in memory to indices, and into their order
            channels, inner = x.shape[channel_dim], math.prod(x.shape[channel_dim + 1 :])
            place, channel = indices // channels, indices % channels
            indices = (place // inner * channels + channel) * inner + place % inner
            indices, order = indices.sort()
            values = values[order]
        return values, indices, counts

    return run


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup_relu(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, scale, _, ctx.dim = inputs
    y, counts = output
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(y, scale, None if scale is None else x)


def _relu_backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    y, scale, x = ctx.saved_tensors
    passed = torch.ops.aten.threshold_backward(grad, y, 0)
    return _to_inputs(passed, scale, x, ctx.dim)


def _setup_codes(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, scale, _, ctx.dim = inputs
    _, indices, counts = output
    ctx.shape = x.shape
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(indices, scale, None if scale is None else x)


def _codes_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    indices, scale, x = ctx.saved_tensors
    dense = grad.new_zeros(math.prod(ctx.shape)).scatter(0, indices, grad).view(ctx.shape)
    return _to_inputs(dense, scale, x, ctx.dim)


def _to_inputs(
    passed: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor | None, dim: int
) -> Any:
    """Gradients of x, threshold, scale, shift, channel_dim, given that of z."""
    if scale is None or x is None:
        return passed, None, None, None, None
    of_z = wide(passed)

    def sums(tensor: torch.Tensor) -> torch.Tensor:
        return channel_sum(tensor, dim).to(scale.dtype)

    of_x = of_z * across(scale.to(of_z.dtype), x.dim(), dim)
    return of_x.to(x.dtype), None, sums(of_z * wide(x)), sums(of_z), None


def _codes_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    """Entry by entry; all must have as many codes."""
    entries = each_entry(_threshold_codes, info, in_dims, args)
    found = sorted({values.shape[0] for values, *_ in entries})
    if len(found) > 1:
        raise ValueError(
            "threshold_codes: under vmap all entries must have the same number of codes, got "
            f"{found[0]}..{found[-1]}; use threshold_relu"
        )
    return tuple(map(torch.stack, zip(*entries, strict=True))), (0, 0, 0)


# -- shapes only -----------------------------------------------------------------------------------


def _fake_relu(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    placed = layout(x, options[-1])
    return placed.restored(torch.empty_like(placed.tensor)), _fake_counts(x, options[-1])


def _fake_counts(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return x.new_empty(x.shape[channel_dim], dtype=torch.int64)


def _fake_codes(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = library.unknown_size()
    indices = x.new_empty(count, dtype=torch.int64)
    return x.new_empty(count), indices, _fake_counts(x, options[-1])


_ARGUMENTS = "(Tensor x, Tensor threshold, Tensor? scale, Tensor? shift, SymInt channel_dim)"
_threshold_relu: Callable[..., Any] = library.define(
    "threshold_relu",
    f"{_ARGUMENTS} -> (Tensor y, Tensor counts)",
    reference=threshold_relu_reference,
    implementations={name: _dense(name) for name in ("native", "triton")},
    fake=_fake_relu,
    check=_check,
    setup_context=_setup_relu,
    backward=_relu_backward,
    vmap=one_by_one(lambda: _threshold_relu),
)
_threshold_codes: Callable[..., Any] = library.define(
    "threshold_codes",
    f"{_ARGUMENTS} -> (Tensor values, Tensor indices, Tensor counts)",
    reference=threshold_codes_reference,
    implementations={"native": _compacted("native")},
    fake=_fake_codes,
    check=_check,
    setup_context=_setup_codes,
    backward=_codes_backward,
    vmap=_codes_vmap,
)
