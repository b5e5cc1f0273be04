"""The torch operation gather_dot: shapes, gradient, batches, autocast, and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.dtensors import ROWS, Rows
from ...dispatch.operations import define
from ..checks import check_range
from ..codes import shift_by_entry
from ..layout import contiguous_matrix, unit_stride
from ..sparse_matmul.operation import sparse_matmul, sparse_matmul_backward
from ..transpose_codes.checks import usable_grouping
from . import native
from .checks import check_arguments
from .reference import gather_dot_reference


def _triton(*args: Any) -> torch.Tensor:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton.gather_dot(*args)


def _adapt(kernel: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """Adapt a kernel of contiguous matrices to any leading dimensions and strides."""

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kernel_checks = backend == "native" and x.is_cpu
        n = weight.shape[0]
        if not kernel_checks:
            check_range("gather_dot", indices, n)
        if indices.numel() == 0 or weight.numel() == 0:
            return gather_dot_reference(x, weight, indices)
        if offsets is not None and positions is not None:
            offsets, positions = usable_grouping(
                "gather_dot", offsets, positions, indices, n, kernel_checks=kernel_checks
            )
        rows, places = contiguous_matrix(x), contiguous_matrix(indices)
        products = kernel(rows, unit_stride(weight), places, offsets, positions)
        return products.view(indices.shape)

    return run


def _fake(x: torch.Tensor, weight: Any, indices: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(indices.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, indices, *transposition = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if need_x:
        grad_x = sparse_matmul(grad, indices, weight, None, *transposition)
    if need_weight:
        _, grad_weight = sparse_matmul_backward(
            x, grad, indices, weight, False, True, *transposition
        )
    return grad_x, grad_weight, None, None, None


def _vmap(operation: Callable[..., torch.Tensor], info: Any, in_dims: Any, *args: Any) -> Any:
    """Call the operation once, the batch as one more leading dimension.

    A batch of weights [B, N, D] becomes one of [B * N, D], the indices of entry b shifted by b * N.
    """
    x, weight, indices = (
        arg.movedim(dim, 0)
        if dim is not None
        else arg
        if position == 1
        else arg.expand(info.batch_size, *arg.shape)
        for position, (arg, dim) in enumerate(zip(args[:3], in_dims[:3], strict=True))
    )
    if in_dims[1] is not None:
        indices = shift_by_entry(indices, weight.shape[1])
        weight = weight.flatten(0, 1)
    return operation(x, weight, indices), 0


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    x, weight, *rest = args
    if torch.float64 in (x.dtype, weight.dtype):  # as in torch.matmul
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight = weight.to(dtype)
    return x.to(dtype), weight, *rest


gather_dot = define(
    "gather_dot",
    "(Tensor x, Tensor weight, Tensor indices, Tensor? offsets=None, Tensor? positions=None)"
    " -> Tensor",
    reference=gather_dot_reference,
    implementations={
        "native": _adapt(native.gather_dot, "native"),
        "triton": _adapt(_triton, "triton"),
    },
    fake=_fake,
    check=check_arguments,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
    autocast=_autocast,
    rows=Rows((0, 2), (ROWS,), groupings=(3, 4)),
)
