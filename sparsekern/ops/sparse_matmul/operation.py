"""The torch operation sparse_matmul: shapes, gradients, batches, autocast, and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.dtensors import ROWS, SUM, Rows
from ...dispatch.fast_path import NOTHING, left_to_torch
from ...dispatch.launch import INDEX_TAGS
from ...dispatch.operations import define, operations
from ..checks import check_range
from ..codes import shift_by_entry
from ..layout import contiguous_matrix, empty_like_dictionary, matrix_of, sum_dtype, unit_stride
from ..transpose_codes.checks import usable_grouping
from . import native
from .checks import check_gradients, check_product
from .reference import sparse_matmul_backward_reference, sparse_matmul_reference

# -- kernels take matrices -------------------------------------------------------------------------


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _kernel_checks(backend: str, values: torch.Tensor) -> bool:
    """Return True where the kernel itself finds indices that are out of range."""
    return backend == "native" and values.is_cpu


def _adapt(kernel: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """Adapt a kernel of contiguous matrices to any leading dimensions and strides."""

    def run(
        values: Any, indices: Any, weight: torch.Tensor, bias: Any, *_transposition: Any
    ) -> torch.Tensor:
        if not _kernel_checks(backend, values):
            check_range("sparse_matmul", indices, weight.shape[0])
        if values.numel() == 0 or weight.numel() == 0:
            return sparse_matmul_reference(values, indices, weight, bias)
        bias = None if bias is None else bias.contiguous()
        out = kernel(
            contiguous_matrix(values), contiguous_matrix(indices), unit_stride(weight), bias
        )
        if values.dim() == 2:
            return out
        return out.view(*values.shape[:-1], weight.shape[1]).detach()

    return run


def _adapt_backward(kernel: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Adapt a kernel of contiguous matrices to any leading dimensions and strides."""

    def run(
        grad: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        weight: torch.Tensor,
        need_values: bool,
        need_weight: bool,
        *transposition: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if values.numel() == 0 or weight.numel() == 0:
            return sparse_matmul_backward_reference(
                grad, values, indices, weight, need_values, need_weight
            )
        if not _kernel_checks(backend, values):
            check_range("sparse_matmul", indices, weight.shape[0])
        if transposition and transposition[0] is not None:
            offsets, positions = transposition
            transposition = usable_grouping(
                "sparse_matmul", offsets, positions, indices, weight.shape[0],
                kernel_checks=_kernel_checks(backend, values),
            )  # fmt: skip
        grad_values, grad_weight = kernel(
            contiguous_matrix(grad),
            contiguous_matrix(values),
            contiguous_matrix(indices),
            unit_stride(weight),
            need_values,
            need_weight,
            *transposition,
        )
        return grad_values.view(values.shape) if need_values else grad_values, grad_weight

    return run


# -- shapes without data ---------------------------------------------------------------------------


def _fake(
    values: torch.Tensor, indices: Any, weight: torch.Tensor, bias: Any, *_transposition: Any
) -> torch.Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[1])


def _backward_fake(
    grad: Any,
    values: Any,
    indices: Any,
    weight: Any,
    need_values: bool,
    need_weight: bool,
    *_transposition: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_values = values.new_empty(values.shape if need_values else 0)
    return grad_values, empty_like_dictionary(weight) if need_weight else weight.new_empty(0)


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, weight, bias, offsets, positions = inputs
    ctx.save_for_backward(values, indices, weight, offsets, positions)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    values, indices, weight, *transposition = ctx.saved_tensors
    need_values, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_values = grad_weight = grad_bias = None
    if need_values or need_weight:
        both = sparse_matmul_backward(
            grad, values, indices, weight, need_values, need_weight, *transposition
        )
        grad_values = both[0] if need_values else None
        grad_weight = both[1] if need_weight else None
    if need_bias:
        grad_bias = matrix_of(grad).sum(0, dtype=sum_dtype(grad.dtype))
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_values, None, grad_weight, grad_bias, None, None


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, values, indices, weight, ctx.need_values, ctx.need_weight, *transposition = inputs
    ctx.save_for_backward(grad, values, indices, weight, *transposition)


def _double_backward(ctx: Any, upstream_values: torch.Tensor, upstream_weight: torch.Tensor) -> Any:
    """Return the gradients of grad, values and weight, given those of d values and d weight.

    d values and d weight are bilinear in (grad, values, weight).
    """
    grad, values, indices, weight, *transposition = ctx.saved_tensors
    need_grad, need_values, _, need_weight, *_ = ctx.needs_input_grad
    grad_grad = grad_values = grad_weight = None
    if ctx.need_values:  # d values = grad . weight[i]
        if need_grad:
            grad_grad = sparse_matmul(upstream_values, indices, weight, None, *transposition)
        if need_weight:
            _, grad_weight = sparse_matmul_backward(
                grad, upstream_values, indices, weight, False, True, *transposition
            )
    if ctx.need_weight:  # d weight = sum of values * grad
        upstream = upstream_weight.to(weight.dtype)
        if need_grad:
            term = sparse_matmul(values, indices, upstream, None, *transposition)
            grad_grad = term if grad_grad is None else grad_grad + term
        if need_values:
            grad_values, _ = sparse_matmul_backward(
                grad, values, indices, upstream, True, False, *transposition
            )
    return grad_grad, grad_values, None, grad_weight, None, None, None, None


# -- batches and autocast --------------------------------------------------------------------------


def _batch_first(
    info: Any, in_dims: Any, args: Any, weight_position: int
) -> tuple[list[Any], bool]:
    """Move the batch to the front of all arguments but the weight, and say if that has one, too.

    A batch of weights [B, N, D] becomes one dictionary [B * N, D], entry b's indices shifted by
    b * N.
    """
    moved: list[Any] = [
        arg
        if arg is None or not isinstance(arg, torch.Tensor)
        else arg.movedim(dim, 0)
        if dim is not None
        else arg.expand(info.batch_size, *arg.shape)
        if position != weight_position
        else arg
        for position, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    batched_weight = in_dims[weight_position] is not None
    if batched_weight:
        indices, weight = moved[weight_position - 1], moved[weight_position]
        moved[weight_position - 1] = shift_by_entry(indices, weight.shape[1])
        moved[weight_position] = weight.flatten(0, 1)
    return moved, batched_weight


def _vmap(operation: Callable[..., torch.Tensor], info: Any, in_dims: Any, *args: Any) -> Any:
    (values, indices, weight, bias), _ = _batch_first(info, in_dims[:4], args[:4], 2)
    out = operation(values, indices, weight, None)
    if bias is not None:
        out = out + bias.view(bias.shape[0], *[1] * (out.dim() - 2), -1).to(out.dtype)
    return out, 0


def _backward_vmap(operation: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    (grad, values, indices, weight, need_values, need_weight), batched_weight = _batch_first(
        info, in_dims[:6], args[:6], 3
    )
    if need_weight and not batched_weight:  # each batch entry has its own gradient of the weight
        indices = shift_by_entry(indices, weight.shape[0])
        weight = weight.repeat(info.batch_size, 1)
    grad_values, grad_weight = operation(grad, values, indices, weight, need_values, need_weight)
    batch = info.batch_size
    if need_weight:
        grad_weight = grad_weight.reshape(batch, -1, weight.shape[1])
    else:
        grad_weight = grad_weight.expand(batch, 0)
    return (grad_values if need_values else grad_values.expand(batch, 0), grad_weight), (0, 0)


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *transposition = args
    if torch.float64 in (values.dtype, weight.dtype):  # as in torch.matmul
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return values.to(dtype), indices, weight, bias, *transposition


sparse_matmul = define(
    "sparse_matmul",
    "(Tensor values, Tensor indices, Tensor weight, Tensor? bias, Tensor? offsets=None,"
    " Tensor? positions=None) -> Tensor",
    reference=sparse_matmul_reference,
    implementations={
        "native": _adapt(native.sparse_matmul, "native"),
        "triton": _adapt(lambda *args: _triton_module().sparse_matmul(*args), "triton"),
    },
    fake=_fake,
    check=check_product,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
    autocast=_autocast,
    owned=True,
    rows=Rows((0, 1), (ROWS,), groupings=(4, 5)),
)
_operation = operations["sparse_matmul"]


def quick_product(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the product of matrices where nothing but the CPU's kernel is needed; else None.

    The arguments need not be checked: what is not right is left to other ways.
    """
    if not (isinstance(values, torch.Tensor) and isinstance(indices, torch.Tensor)):
        return None
    if bias is not None or not isinstance(weight, torch.Tensor):
        return None
    if left_to_torch((values, indices, weight)) != NOTHING:
        return None
    if not (values.is_cpu and indices.is_cpu and weight.is_cpu):
        return None
    if values.dtype != weight.dtype or indices.dtype not in INDEX_TAGS:
        return None
    if values.dim() != 2 or weight.dim() != 2 or values.shape != indices.shape:
        return None
    if not (values.is_contiguous() and indices.is_contiguous() and weight.is_contiguous()):
        return None
    if not (values.numel() and weight.numel() and _operation.runs_natively(values)):
        return None
    return native.sparse_matmul(values, indices, weight, None)


sparse_matmul_backward = define(
    "sparse_matmul_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight, bool need_values,"
    " bool need_weight, Tensor? offsets=None, Tensor? positions=None)"
    " -> (Tensor grad_values, Tensor grad_weight)",
    reference=sparse_matmul_backward_reference,
    implementations={
        "native": _adapt_backward(native.sparse_matmul_backward, "native"),
        "triton": _adapt_backward(
            lambda *args: _triton_module().sparse_matmul_backward(*args), "triton"
        ),
    },
    fake=_backward_fake,
    check=check_gradients,
    setup_context=_setup_backward,
    backward=_double_backward,
    vmap=_backward_vmap,
    rows=Rows((0, 1, 2), (ROWS, SUM), groupings=(6, 7)),
)
