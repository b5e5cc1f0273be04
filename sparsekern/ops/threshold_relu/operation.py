"""The torch operations threshold_relu and threshold_codes: shapes, gradients, batches, kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.dtensors import ROWS, SUM, Rows
from ...dispatch.operations import define, unknown_size
from ..batching import apply_to_entries, one_by_one
from ..channels import across, channel_sum, constants, layout
from ..layout import sum_dtype
from . import native
from .checks import check_arguments
from .reference import threshold_codes_reference, threshold_relu_reference, wide


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(kernel: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Adapt a kernel of [outer, C, inner] to any dimensions and strides."""

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


def _native_codes(
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
    if placed.moved:  # from positions in memory to indices into x, in ascending order
        channels, inner = x.shape[channel_dim], math.prod(x.shape[channel_dim + 1 :])
        pixel, channel = indices // channels, indices % channels
        indices = (pixel // inner * channels + channel) * inner + pixel % inner
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
    grad_z = torch.ops.aten.threshold_backward(grad, y, 0)
    return _input_gradients(grad_z, scale, x, ctx.dim)


def _setup_codes(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, scale, _, ctx.dim = inputs
    _, indices, counts = output
    ctx.shape = x.shape
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(indices, scale, None if scale is None else x)


def _codes_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    indices, scale, x = ctx.saved_tensors
    grad_z = grad.new_zeros(math.prod(ctx.shape)).scatter(0, indices, grad).view(ctx.shape)
    return _input_gradients(grad_z, scale, x, ctx.dim)


def _input_gradients(
    grad_z: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor | None, dim: int
) -> Any:
    """Return the gradients of x, threshold, scale, shift, channel_dim, given that of z."""
    if scale is None or x is None:
        return grad_z, None, None, None, None
    grad_z = wide(grad_z)

    def channel_sums(tensor: torch.Tensor) -> torch.Tensor:
        return channel_sum(tensor, dim).to(scale.dtype)

    grad_x = grad_z * across(scale.to(grad_z.dtype), x.dim(), dim)
    grad_scale, grad_shift = channel_sums(grad_z * wide(x)), channel_sums(grad_z)
    return grad_x.to(x.dtype), None, grad_scale, grad_shift, None


def _codes_vmap(operation: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """Apply the operation entry by entry; raise unless all entries have equally many codes."""
    entries = apply_to_entries(operation, info, in_dims, args)
    counts = sorted({values.shape[0] for values, *_ in entries})
    if len(counts) > 1:
        raise ValueError(
            "threshold_codes: under vmap all entries must have the same number of codes, got "
            f"{counts[0]}..{counts[-1]}; use threshold_relu"
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
threshold_relu = define(
    "threshold_relu",
    f"{_ARGUMENTS} -> (Tensor y, Tensor counts)",
    reference=threshold_relu_reference,
    implementations={
        "native": _adapt(native.threshold_relu),
        "triton": _adapt(lambda *args: _triton_module().threshold_relu(*args)),
    },
    fake=_fake_relu,
    check=check_arguments,
    setup_context=_setup_relu,
    backward=_relu_backward,
    vmap=one_by_one,
    rows=Rows((0,), (ROWS, SUM), whole_dim=4),
)
threshold_codes = define(
    "threshold_codes",
    f"{_ARGUMENTS} -> (Tensor values, Tensor indices, Tensor counts)",
    reference=threshold_codes_reference,
    implementations={"native": _native_codes},
    fake=_fake_codes,
    check=check_arguments,
    setup_context=_setup_codes,
    backward=_codes_backward,
    vmap=_codes_vmap,
)
