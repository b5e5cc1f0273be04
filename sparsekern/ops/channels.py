"""Tensors with channels: which dimension holds them, and how they lie in memory.

Kernels see one form, [outer, C, inner], contiguous. Channels first, [B, C, H, W], is outer = B,
inner = H * W; channels last, [B, H, W, C] or torch.channels_last, is outer = B * H * W, inner = 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .checks import check_floating, check_same_device


class Layout(NamedTuple):
    """A tensor in the kernels' form, and the way back."""

    tensor: torch.Tensor
    """[outer, C, inner], contiguous."""
    shape: torch.Size
    """Of the tensor, its channels last if moved."""
    dim: int
    """Which dimension held the channels."""
    moved: bool
    """Whether they lie last in memory, but not in the tensor."""

    def restored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this form in the shape, and with the strides, that the first one had."""
        tensor = tensor.view(self.shape)
        return tensor.movedim(-1, self.dim) if self.moved else tensor


def check_channels(op: str, x: torch.Tensor, channel_dim: int) -> int:
    """The dimension of the channels of a floating tensor, counted from 0."""
    check_floating(op, "x", x)
    return check_channel_dim(op, "x", x.dim(), channel_dim)


def check_channel_dim(op: str, name: str, dims: int, channel_dim: int) -> int:
    """The dimension of the channels of what has `dims` of them, counted from 0."""
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"{op}: channel_dim must lie in {-dims}..{dims - 1} ({name} has {dims} dimensions), "
            f"got {channel_dim}"
        )
    return channel_dim % dims


def check_constants(op: str, x: torch.Tensor, dim: int, **tensors: torch.Tensor | None) -> None:
    """Numbers per channel, [C] floating point on x's device, by the names of their arguments."""
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


def constants(kind: torch.dtype, *tensors: torch.Tensor | None) -> list[Any]:
    """Numbers per channel as the kernels take them: contiguous, in the dtype they compute in."""
    return [None if tensor is None else tensor.to(kind).contiguous() for tensor in tensors]


def lies_last(x: torch.Tensor, dim: int) -> bool:
    """Whether the channels lie last in memory, but not in the tensor."""
    return not x.is_contiguous() and x.movedim(dim, -1).is_contiguous()


def layout(x: torch.Tensor, dim: int) -> Layout:
    """x in the kernels' form; copied only if it is contiguous neither as it is nor with its
    channels last."""
    moved = lies_last(x, dim)
    x = x.movedim(dim, -1) if moved else x.contiguous()
    at = x.dim() - 1 if moved else dim
    outer, inner = math.prod(x.shape[:at]), math.prod(x.shape[at + 1 :])
    return Layout(x.view(outer, x.shape[at], inner), x.shape, dim, moved)


def placed_like(tensor: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor in x's dtype, with the strides that the kernels give their results for x: compiled
    code relies on them."""
    tensor = tensor.to(x.dtype)
    if lies_last(x, dim):
        return tensor.movedim(dim, -1).contiguous().movedim(-1, dim)
    return tensor.contiguous()


def channels_of(indices: torch.Tensor, channels: int, inner: int) -> torch.Tensor:
    """The channel of each flat index into a tensor [outer, channels, inner]."""
    return indices // inner % channels


def across(tensor: torch.Tensor, dims: int, dim: int) -> torch.Tensor:
    """[C] so that it broadcasts against a tensor of `dims` dimensions with its channels in dim."""
    return tensor.view(-1, *[1] * (dims - 1 - dim))


def channel_sum(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums [C] over all dimensions but that of the channels."""
    pooled = [other for other in range(tensor.dim()) if other != dim]
    return tensor.sum(pooled) if pooled else tensor.clone()  # no dimensions would mean all of them
