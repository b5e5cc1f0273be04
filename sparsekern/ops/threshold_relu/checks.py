"""Checks of the arguments of threshold_relu and threshold_codes."""

from __future__ import annotations

import torch

from ..channels import check_channels, check_constants


def check_threshold(
    op: str,
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> tuple[int, torch.Tensor]:
    """Check the arguments; return the dimension of the channels and the detached threshold."""
    dim = check_channels(op, x, channel_dim)
    if (scale is None) != (shift is None):
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{op}: {given} needs {missing}, got {given} alone")
    check_constants(op, x, dim, threshold=threshold, scale=scale, shift=shift)
    return dim, threshold.detach()


def check_arguments(
    x: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    channel_dim: int,
) -> None:
    """Check the arguments of the operations, as torch.ops passes them."""
    check_threshold("threshold_relu", x, threshold, scale, shift, channel_dim)
