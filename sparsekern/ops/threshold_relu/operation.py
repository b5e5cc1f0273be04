"""What torch knows of threshold_relu and threshold_codes: shapes, gradients, batches, and which
kernels serve them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define, unknown_size
from ..batching import each_entry, one_by_one
from ..channels import across, channel_sum, constants, layout
from ..layout import sum_dtype
from . import native
from .checks import check_arguments
from .reference import threshold_codes_reference, threshold_relu_reference, wide


def _triton() -> Any:
    from . import triton  # at the first call that it serves: it needs the package triton

    return triton


def _dense(kernel: Any) -> Any:
    """A kernel of [outer, C, inner], for any dimensions and strides."""

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
        y, counts = kernel(placed.tensor, *constants(sum_dtype(x.dtype), threshold, scale, shift))
        return placed.restored(y), counts

    return run


def _compacted(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        return threshold_codes_reference(x, threshold, scale, shift, channel_dim)
    placed = layout(x, channel_dim)
    values, indices, counts = native.threshold_codes(
        placed.tensor, *constants(sum_dtype(x.dtype), threshold, scale, shift)
    )
    if placed.moved:  # from places in memory to indices, and into their order
        channels, inner = x.shape[channel_dim], math.prod(x.shape[channel_dim + 1 :])
        place, channel = indices // channels, indices % channels
        indices = (place // inner * channels + channel) * inner + place % inner
        indices, order = indices.sort()
        values = values[order]
    return values, indices, counts


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
    entries = each_entry(threshold_codes, info, in_dims, args)
    found = sorted({values.shape[0] for values, *_ in entries})
    if len(found) > 1:
        raise ValueError(
            "threshold_codes: under vmap all entries must have the same number of codes, got "
            f"{found[0]}..{found[-1]}; use threshold_relu"
        )
    return tuple(map(torch.stack, zip(*entries, strict=True))), (0, 0, 0)


def _fake_relu(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    placed = layout(x, options[-1])
    return placed.restored(torch.empty_like(placed.tensor)), _fake_counts(x, options[-1])


def _fake_counts(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return x.new_empty(x.shape[channel_dim], dtype=torch.int64)


def _fake_codes(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = unknown_size()
    indices = x.new_empty(count, dtype=torch.int64)
    return x.new_empty(count), indices, _fake_counts(x, options[-1])


_ARGUMENTS = "(Tensor x, Tensor threshold, Tensor? scale, Tensor? shift, SymInt channel_dim)"
threshold_relu: Callable[..., Any] = define(
    "threshold_relu",
    f"{_ARGUMENTS} -> (Tensor y, Tensor counts)",
    reference=threshold_relu_reference,
    implementations={
        "native": _dense(native.threshold_relu),
        "triton": _dense(lambda *args: _triton().threshold_relu(*args)),
    },
    fake=_fake_relu,
    check=check_arguments,
    setup_context=_setup_relu,
    backward=_relu_backward,
    vmap=one_by_one(lambda: threshold_relu),
)
threshold_codes: Callable[..., Any] = define(
    "threshold_codes",
    f"{_ARGUMENTS} -> (Tensor values, Tensor indices, Tensor counts)",
    reference=threshold_codes_reference,
    implementations={"native": _compacted},
    fake=_fake_codes,
    check=check_arguments,
    setup_context=_setup_codes,
    backward=_codes_backward,
    vmap=_codes_vmap,
)
