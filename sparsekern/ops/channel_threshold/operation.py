"""The torch operation channel_threshold: shapes, batches, and the kernels that serve it."""

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


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adapt a kernel of [outer, C, inner] to any dimensions and strides."""

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


channel_threshold = define(
    "channel_threshold",
    "(Tensor x, SymInt rank, SymInt channel_dim) -> Tensor",
    reference=channel_threshold_reference,
    implementations={
        "native": _adapt(native.channel_threshold),
        "triton": _adapt(lambda *args: _triton_module().channel_threshold(*args)),
    },
    fake=_fake,
    vmap=one_by_one,
)
