"""What torch knows of count_active: shapes, batches, and which kernels serve it."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.operations import define
from ..checks import check_codes, check_range, check_size
from . import native
from .reference import count_active_reference


def _check(indices: torch.Tensor, n: int, values: torch.Tensor | None = None) -> None:
    check_codes("count_active", values, indices)
    check_size("count_active", "n", n)


def _flat(kernel: Any) -> Any:
    """A kernel of contiguous vectors, for any shape."""

    def run(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
        flat_values = None if values is None else values.reshape(-1).contiguous()
        return kernel(indices.reshape(-1).contiguous(), n, flat_values)

    return run


def _triton(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    from . import triton  # at the first call that it serves: it needs the package triton

    check_range("count_active", indices, n)
    return triton.count_active(indices, n, values)


def _fake(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    return indices.new_empty(n, dtype=torch.int64)


def _vmap(info: Any, in_dims: Any, indices: Any, n: int, values: Any) -> Any:
    """Batch entry b counts into its own n latents: indices shifted by b*n, one call."""

    def front(tensor: torch.Tensor | None, dim: int | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    indices, values = front(indices, in_dims[0]), front(values, in_dims[2])
    steps = torch.arange(info.batch_size, device=indices.device) * n
    shifted = indices + steps.view(-1, *[1] * (indices.dim() - 1))
    return count_active(shifted, n * info.batch_size, values).view(-1, n), 0


count_active = define(
    "count_active",
    "(Tensor indices, SymInt n, Tensor? values) -> Tensor",
    reference=count_active_reference,
    implementations={"native": _flat(native.count_active), "triton": _flat(_triton)},
    fake=_fake,
    check=_check,
    vmap=_vmap,
)
