"""Tensors with channels: the dimension that holds them, and their layout in memory.

Kernels see one form, [outer, C, inner], contiguous. Channels first, [B, C, H, W], is outer = B,
inner = H * W; channels last, [B, H, W, C] or torch.channels_last, is outer = B * H * W, inner = 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .checks import check_floating, check_same_device


class Layout(NamedTuple):
    """A tensor in the kernels' form, and what takes it back to its own."""

    tensor: torch.Tensor
    """[outer, C, inner], contiguous."""
    shape: torch.Size
    """Of the tensor, its channels last if moved."""
    dim: int
    """The dimension that held the channels."""
    moved: bool
    """True where the channels lie last in memory, but not in the tensor."""

    def restored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the kernels' form with the shape and strides of the original one."""
        tensor = tensor.view(self.shape)
        return tensor.movedim(-1, self.dim) if self.moved else tensor


def check_channels(op: str, x: torch.Tensor, channel_dim: int) -> int:
    """Check a floating tensor and its channel_dim; return the latter counted from 0."""
    check_floating(op, "x", x)
    return check_channel_dim(op, "x", x.dim(), channel_dim)


def check_channel_dim(op: str, name: str, dims: int, channel_dim: int) -> int:
    """Check a channel_dim among `dims` dimensions; return it counted from 0."""
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"{op}: channel_dim must lie in {-dims}..{dims - 1} ({name} has {dims} dimensions), "
            f"got {channel_dim}"
        )
    return channel_dim % dims


def check_constants(op: str, x: torch.Tensor, dim: int, **tensors: torch.Tensor | None) -> None:
    """Check numbers per channel, by argument: [C], floating point, on x's device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_floating(op, name, tensor)
        if tensor.shape != (x.shape[dim],):
            raise ValueError(
                f"{op}: {name} must have shape [{x.shape[dim]}] (the channels of x), got "
                f"{list(tensor.shape)}"
            )
    check_same_device(op, x=x, **tensors)


def constants(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[Any]:
    """Return numbers per channel as the kernels take them: contiguous, in the sums' dtype."""
    return [None if tensor is None else tensor.to(dtype).contiguous() for tensor in tensors]


def channels_lie_last(x: torch.Tensor, dim: int) -> bool:
    """Return True where the channels lie last in memory, but not in the tensor."""
    return not x.is_contiguous() and x.movedim(dim, -1).is_contiguous()


def layout(x: torch.Tensor, dim: int) -> Layout:
    """Return x in the kernels' form.

    It is copied only if it is contiguous neither as it is nor with its channels last.
    """
    moved = channels_lie_last(x, dim)
    x = x.movedim(dim, -1) if moved else x.contiguous()
    channel_dim = x.dim() - 1 if moved else dim
    outer, inner = math.prod(x.shape[:channel_dim]), math.prod(x.shape[channel_dim + 1 :])
    return Layout(x.view(outer, x.shape[channel_dim], inner), x.shape, dim, moved)


def placed_like(tensor: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a tensor in x's dtype, with the strides of the kernels' results for x.

    Compiled code relies on these strides.
    """
    tensor = tensor.to(x.dtype)
    if channels_lie_last(x, dim):
        return tensor.movedim(dim, -1).contiguous().movedim(-1, dim)
    return tensor.contiguous()


def channels_of(indices: torch.Tensor, channels: int, inner: int) -> torch.Tensor:
    """Return the channel of each flat index into a tensor [outer, channels, inner]."""
    return indices // inner % channels


def across(tensor: torch.Tensor, dims: int, dim: int) -> torch.Tensor:
    """Reshape [C] to broadcast against a tensor of `dims` dimensions with its channels in dim."""
    return tensor.view(-1, *[1] * (dims - 1 - dim))


def channel_sum(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all dimensions but that of the channels; return [C]."""
    pooled = [other for other in range(tensor.dim()) if other != dim]
    return tensor.sum(pooled) if pooled else tensor.clone()  # sum([]) would sum over all dimensions
