"""The torch operation count_active: shapes, batches, and the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.dtensors import SUM, Rows
from ...dispatch.operations import define
from ..checks import check_codes, check_range, check_size
from ..codes import shift_by_entry
from . import native
from .reference import count_active_reference


def _check(indices: torch.Tensor, n: int, values: torch.Tensor | None = None) -> None:
    check_codes("count_active", values, indices)
    check_size("count_active", "n", n)


def _adapt(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adapt a kernel of contiguous vectors to codes of any shape."""

    def run(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
        flat_values = None if values is None else values.reshape(-1).contiguous()
        return kernel(indices.reshape(-1).contiguous(), n, flat_values)

    return run


def _triton(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    from . import triton  # imported at the first call that it serves: the package may be missing

    check_range("count_active", indices, n)
    return triton.count_active(indices, n, values)


def _fake(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    return indices.new_empty(n, dtype=torch.int64)


def _vmap(
    operation: Callable[..., torch.Tensor],
    info: Any,
    in_dims: Any,
    indices: Any,
    n: int,
    values: Any,
) -> tuple[torch.Tensor, int]:
    """Count each batch entry by itself in one call: entry b has latents b*n .. (b+1)*n - 1."""

    def batch_first(tensor: torch.Tensor | None, dim: int | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    indices, values = batch_first(indices, in_dims[0]), batch_first(values, in_dims[2])
    return operation(shift_by_entry(indices, n), n * info.batch_size, values).view(-1, n), 0


count_active = define(
    "count_active",
    "(Tensor indices, SymInt n, Tensor? values) -> Tensor",
    reference=count_active_reference,
    implementations={"native": _adapt(native.count_active), "triton": _adapt(_triton)},
    fake=_fake,
    check=_check,
    vmap=_vmap,
    rows=Rows((0, 2), (SUM,), whole_dim=None),
)
