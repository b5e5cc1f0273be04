"""The torch operation codes_to_dense: shapes, gradient, batches, and the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.dtensors import ROWS, Rows
from ...dispatch.operations import define
from ..batching import leading_dimensions
from ..checks import check_codes, check_range, check_size, places_in_range
from . import native
from .reference import codes_to_dense_reference


def _check(values: torch.Tensor, indices: torch.Tensor, n: int) -> None:
    check_codes("codes_to_dense", values, indices)
    check_size("codes_to_dense", "n", n)


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adapt a kernel of contiguous matrices to any leading dimensions and strides."""

    def run(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
        check_range("codes_to_dense", indices, n)
        if values.numel() == 0:
            return codes_to_dense_reference(values, indices, n)
        k = values.shape[-1]
        dense = kernel(
            values.reshape(-1, k).contiguous(), indices.reshape(-1, k).long().contiguous(), n
        )
        return dense.view(*values.shape[:-1], n)

    return run


def _fake(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    return values.new_empty(*values.shape[:-1], n)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    (indices,) = ctx.saved_tensors
    if indices.is_cpu:  # torch raises an error for an index that has changed since
        return grad.gather(-1, indices.long()), None, None
    inside, places = places_in_range(indices, grad.shape[-1])
    return torch.where(inside, grad.gather(-1, places), 0), None, None


codes_to_dense = define(
    "codes_to_dense",
    "(Tensor values, Tensor indices, SymInt n) -> Tensor",
    reference=codes_to_dense_reference,
    implementations={
        "native": _adapt(native.codes_to_dense),
        "triton": _adapt(lambda *args: _triton_module().codes_to_dense(*args)),
    },
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=leading_dimensions(2),
    rows=Rows((0, 1), (ROWS,)),
)
