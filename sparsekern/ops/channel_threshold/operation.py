"""What torch knows of channel_threshold: shapes, batches, and which kernels serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define
from ..batching import one_by_one
from ..channels import layout
from ..checks import check_row
from . import native
from .reference import channel_threshold_reference


def _triton() -> Any:
    from . import triton  # at the first call that it serves: it needs the package triton

    return triton


def _placed(kernel: Any) -> Any:
    """A kernel of [outer, C, inner], for any dimensions and strides."""

    def run(x: torch.Tensor, rank: int, channel_dim: int) -> torch.Tensor:
        check_row("channel_threshold", x, x.numel() // x.shape[channel_dim])
        placed = layout(x, channel_dim).tensor
        outer, _, inner = placed.shape
        if not 1 <= rank <= outer * inner:
            raise ValueError(
                f"channel_threshold: rank must lie in 1..{outer * inner} (the elements of a "
                f"channel), got {rank}"
            )
        return kernel(placed, rank)

    return run


def _fake(x: torch.Tensor, rank: int, channel_dim: int) -> torch.Tensor:
    return x.new_empty(x.shape[channel_dim])


channel_threshold: Callable[..., Any] = define(
    "channel_threshold",
    "(Tensor x, SymInt rank, SymInt channel_dim) -> Tensor",
    reference=channel_threshold_reference,
    implementations={
        "native": _placed(native.channel_threshold),
        "triton": _placed(lambda *args: _triton().channel_threshold(*args)),
    },
    fake=_fake,
    vmap=one_by_one(lambda: channel_threshold),
)
