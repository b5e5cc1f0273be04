"""What torch knows of sparse_matmul: shapes, gradients, batches, autocast, and which
kernels serve it."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.operations import define
from ..checks import check_range
from ..layout import column_major, empty_like_dictionary, matrix_of, sum_dtype
from ..transpose_codes.checks import check_grouped, check_grouping
from . import native
from .checks import check_gradients, check_product
from .reference import sparse_matmul_backward_reference, sparse_matmul_reference

# -- kernels take matrices -------------------------------------------------------------------------


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix of a tensor's rows; the tensor itself where it is one."""
    if tensor.dim() != 2:
        tensor = matrix_of(tensor)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _addressable(weight: torch.Tensor) -> torch.Tensor:
    """weight itself when one of its strides is 1, else a contiguous copy."""
    return weight if weight.stride(1) == 1 or column_major(weight) else weight.contiguous()


def _triton() -> Any:
    from . import triton  # at the first call that it serves: it needs the package triton

    return triton


def _kernel_looks(backend: str, values: torch.Tensor) -> bool:
    """Whether the kernel itself finds indices that are out of range."""
    return backend == "native" and values.is_cpu


def _matrices(kernel: Any, backend: str) -> Any:
    """A kernel of contiguous matrices, for any leading dimensions and strides."""

    def run(
        values: Any, indices: Any, weight: torch.Tensor, bias: Any, *_transposition: Any
    ) -> torch.Tensor:
        if not _kernel_looks(backend, values):
            check_range("sparse_matmul", indices, weight.shape[0])
        if values.numel() == 0 or weight.numel() == 0:
            return sparse_matmul_reference(values, indices, weight, bias)
        bias = None if bias is None else bias.contiguous()
        out = kernel(_rows(values), _rows(indices), _addressable(weight), bias)
        return out if values.dim() == 2 else out.view(*values.shape[:-1], weight.shape[1]).detach()

    return run


def _backward_matrices(kernel: Any, backend: str) -> Any:
    """A kernel of contiguous matrices, for any leading dimensions and strides."""

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
        if not _kernel_looks(backend, values):
            check_range("sparse_matmul", indices, weight.shape[0])
        if transposition and transposition[0] is not None:
            offsets, positions = transposition
            check_grouping("sparse_matmul", offsets, positions, indices, weight.shape[0])
            if not _kernel_looks(backend, values):
                check_grouped("sparse_matmul", offsets, positions, indices, weight.shape[0])
            if not values.is_cpu:  # not looked at, but never followed to other memory
                codes = indices.numel()
                offsets, positions = offsets.clamp(0, codes), positions.clamp(0, codes - 1)
            transposition = (offsets.contiguous(), positions.contiguous())
        grad_values, grad_weight = kernel(
            _rows(grad),
            _rows(values),
            _rows(indices),
            _addressable(weight),
            need_values,
            need_weight,
            *transposition,
        )
        return grad_values.view(values.shape) if need_values else grad_values, grad_weight

    return run


# -- shapes without data ---------------------------------------------------------------------------


def _fake(values: Any, indices: Any, weight: Any, bias: Any, *_transposition: Any) -> torch.Tensor:
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


def _double_backward(ctx: Any, grad_gv: torch.Tensor, grad_gw: torch.Tensor) -> Any:
    """With a, C the gradients of (d values, d weight): both are bilinear in (grad, values,
    weight)."""
    grad, values, indices, weight, *grouped = ctx.saved_tensors
    need_grad, need_values, _, need_weight, *_ = ctx.needs_input_grad
    to_grad = to_values = to_weight = None
    if ctx.need_values:  # d values = grad . weight[i], seen with upstream a
        if need_grad:
            to_grad = sparse_matmul(grad_gv, indices, weight, None, *grouped)
        if need_weight:
            to_weight = sparse_matmul_backward(
                grad, grad_gv, indices, weight, False, True, *grouped
            )[1]
    if ctx.need_weight:  # d weight = sum values * grad, seen with upstream C
        upstream = grad_gw.to(weight.dtype)
        if need_grad:
            term = sparse_matmul(values, indices, upstream, None, *grouped)
            to_grad = term if to_grad is None else to_grad + term
        if need_values:
            to_values = sparse_matmul_backward(
                grad, values, indices, upstream, True, False, *grouped
            )[0]
    return to_grad, to_values, None, to_weight, None, None, None, None


# -- batches and autocast --------------------------------------------------------------------------


def _stacked(info: Any, in_dims: Any, args: Any, weight_at: int) -> tuple[list[Any], bool]:
    """Batch dimensions moved to the front; a batch of dictionaries becomes one tall one, indices
    shifted by b*N."""
    moved: list[Any] = [
        arg
        if arg is None or not isinstance(arg, torch.Tensor)
        else arg.movedim(dim, 0)
        if dim is not None
        else arg.expand(info.batch_size, *arg.shape)
        if at != weight_at
        else arg
        for at, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    tall = in_dims[weight_at] is not None
    if tall:
        indices, weight = moved[weight_at - 1], moved[weight_at]
        n = weight.shape[1]
        steps = torch.arange(info.batch_size, device=indices.device) * n
        moved[weight_at - 1] = indices + steps.view(-1, *[1] * (indices.dim() - 1))
        moved[weight_at] = weight.flatten(0, 1)
    return moved, tall


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (values, indices, weight, bias), _ = _stacked(info, in_dims[:4], args[:4], 2)
    out = sparse_matmul(values, indices, weight, None)
    if bias is not None:
        out = out + bias.view(bias.shape[0], *[1] * (out.dim() - 2), -1).to(out.dtype)
    return out, 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (grad, values, indices, weight, need_values, need_weight), tall = _stacked(
        info, in_dims[:6], args[:6], 3
    )
    if need_weight and not tall:  # one gradient per batch entry: a dictionary each
        n = weight.shape[0]
        steps = torch.arange(info.batch_size, device=indices.device) * n
        indices = indices + steps.view(-1, *[1] * (indices.dim() - 1))
        weight = weight.repeat(info.batch_size, 1)
    grad_values, grad_weight = sparse_matmul_backward(
        grad, values, indices, weight, need_values, need_weight
    )
    batch = info.batch_size
    if need_weight:
        grad_weight = grad_weight.reshape(batch, -1, weight.shape[1])
    else:
        grad_weight = grad_weight.expand(batch, 0)
    return (grad_values if need_values else grad_values.expand(batch, 0), grad_weight), (0, 0)


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *transposition = args
    if torch.float64 in (values.dtype, weight.dtype):  # as torch.matmul: left alone
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
        "native": _matrices(native.sparse_matmul, "native"),
        "triton": _matrices(lambda *args: _triton().sparse_matmul(*args), "triton"),
    },
    fake=_fake,
    check=check_product,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
    autocast=_autocast,
    owned=True,
)
sparse_matmul_backward = define(
    "sparse_matmul_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight, bool need_values,"
    " bool need_weight, Tensor? offsets=None, Tensor? positions=None)"
    " -> (Tensor grad_values, Tensor grad_weight)",
    reference=sparse_matmul_backward_reference,
    implementations={
        "native": _backward_matrices(native.sparse_matmul_backward, "native"),
        "triton": _backward_matrices(
            lambda *args: _triton().sparse_matmul_backward(*args), "triton"
        ),
    },
    fake=_backward_fake,
    check=check_gradients,
    setup_context=_setup_backward,
    backward=_double_backward,
    vmap=_backward_vmap,
)
